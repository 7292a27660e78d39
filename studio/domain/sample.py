"""Sample replies: what a model said while it was trained."""

from studio.domain.section import Section


class Sample(Section):
    """One reply: a line of samples.jsonl.

    Attributes:
        step: Steps done when it was asked; 0 is the base.
        prompt: The question.
        reply: The likeliest token each time, without special tokens.
        is_cut: Whether it ran into the limit of tokens.
    """

    step: int
    prompt: str
    reply: str
    is_cut: bool
