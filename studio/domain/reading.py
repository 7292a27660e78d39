"""How a Conversation is read by a model: what is learned of its thinking, what is cut."""

from typing import Literal

from pydantic import Field

from studio.domain.section import Section

ThinkingPolicy = Literal["train", "mask", "strip"]
EmptyThinkPolicy = Literal["prompt", "train"]
TruncationPolicy = Literal["refuse", "cut", "split"]


class Reading(Section):
    """What decides tokens and mask of a Conversation, beside template and tokenizer.

    Attributes:
        thinking: `train` learns it, `mask` reads it without loss, `strip` leaves it out.
        empty_think: What becomes of a think block with nothing in it, which the template may write
            by itself: `prompt` takes it for a part of the question, as at inference with thinking
            off; `train` learns to write it.
    """

    thinking: ThinkingPolicy = "train"
    empty_think: EmptyThinkPolicy = "prompt"


class Truncation(Section):
    """What happens to an example of more than `max_length_tokens`.

    Attributes:
        policy: `refuse` keeps it from training at all, and the run does not start; `cut` drops
            whole turns from the front, never the system message; `split` makes several examples
            of it, each of whole turns. A turn that is too long by itself is lost, and counted.
    """

    max_length_tokens: int | None = Field(default=None, ge=16)
    policy: TruncationPolicy = "refuse"
