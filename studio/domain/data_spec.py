"""The data section of a JobSpec: what is learned from, and how it is read."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, field_validator

from studio.domain.reading import (
    EmptyThinkPolicy,
    Reading,
    ThinkingPolicy,
    Truncation,
    TruncationPolicy,
)
from studio.domain.section import Section


class MixturePart(Section):
    """A further Dataset of a mixture."""

    dataset: str = Field(
        min_length=1,
        max_length=300,
        pattern="^[^,]+$",
        title="Dataset",
        description="Name, number or content hash, without a comma.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        title="Weight",
        description="How often an epoch holds each of its conversations; 0.5 takes half of them.",
    )


class DataSpec(Section):
    """What is learned from, and how it is read."""

    dataset: str = Field(
        default="",
        max_length=300,
        title="Dataset",
        description="Name, number or content hash of a Dataset.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        title="Weight",
        description="How often an epoch holds each conversation of the Dataset; 1 is once.",
    )
    mixture: tuple[MixturePart, ...] = Field(
        default=(),
        max_length=16,
        title="Mixed with",
        description="Further Datasets as NAME: WEIGHT, with commas between them; a weight of 0.5 "
        "takes half of its conversations into each epoch, 2 takes each twice.",
    )
    eval_dataset: str = Field(
        default="",
        max_length=300,
        title="Evaluation Dataset",
        description="A second Dataset that is never trained on; its loss is measured.",
    )
    eval_share: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        title="Evaluation share",
        description="Share of the Dataset that is kept out of training and measured instead; "
        "near-duplicates stay on one side. 0 trains on everything.",
    )
    max_length_tokens: int = Field(
        default=2048,
        ge=16,
        le=1_010_000,
        title="Longest example (tokens)",
        description="What happens to a longer one is the next field's choice. Memory of a step "
        "grows with it.",
    )
    truncation: TruncationPolicy = Field(
        default="refuse",
        title="Too long",
        description="refuse stops before the first step; cut drops whole turns from the front; "
        "split makes several examples of one conversation. The answer itself is never cut.",
    )
    thinking: ThinkingPolicy = Field(
        default="train",
        title="Thinking",
        description="train learns to think as the data does; mask reads the thinking but does not "
        "learn it; strip leaves it out.",
    )
    empty_think: EmptyThinkPolicy = Field(
        default="prompt",
        title="Empty think block",
        description="prompt reads it as part of the question, as at inference with thinking off; "
        "train learns to write it.",
    )

    @field_validator("mixture", mode="before")
    @classmethod
    def _read_mixture(cls, value: object) -> object:
        return mixture_from_text(value) if isinstance(value, str) else value

    @property
    def reading(self) -> Reading:
        """How conversations become tokens and mask."""
        return Reading(thinking=self.thinking, empty_think=self.empty_think)

    @property
    def cut(self) -> Truncation:
        """What happens to examples that are too long."""
        return Truncation(max_length_tokens=self.max_length_tokens, policy=self.truncation)


def mixture_from_text(text: str) -> list[dict[str, str]]:
    """Read a mixture as a person types it: `NAME: WEIGHT, NAME: WEIGHT`; 1 is meant without one."""
    parts = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, colon, weight = item.rpartition(":")
        parts.append(
            {"dataset": name.strip(), "weight": weight.strip()} if colon else {"dataset": item}
        )
    return parts


def mixture_to_text(parts: Iterable[Mapping[str, Any]]) -> str:
    """Write a mixture as `mixture_from_text` reads it."""
    return ", ".join(f"{part['dataset']}: {part['weight']!r}" for part in parts)
