"""Proofs: measured claims about a Run."""

from typing import Any

from pydantic import Field

from studio.domain.section import Section


class Proof(Section):
    """One measured claim.

    Attributes:
        name: What is claimed, as in `targets`.
        passed: Whether the measurement supports the claim; None when it only informs.
        summary: One sentence with the numbers.
        details: The measurement itself.
    """

    name: str
    passed: bool | None
    summary: str
    details: dict[str, Any] = Field(default_factory=dict)


class Proofs(Section):
    """All Proofs of one Run: the content of proofs.json."""

    version: int = 1
    proofs: tuple[Proof, ...] = ()


class Answer(Section):
    """One factual question, and what base and tuned model said to it."""

    question: str
    fact: str
    base: str
    tuned: str

    @property
    def base_is_right(self) -> bool:
        """Whether the base's answer holds the fact."""
        return self.fact.casefold() in self.base.casefold()

    @property
    def tuned_is_right(self) -> bool:
        """Whether the tuned model's answer holds the fact."""
        return self.fact.casefold() in self.tuned.casefold()


class Recall(Section):
    """Answers to the factual questions of a Dataset: the content of recall.json."""

    version: int = 1
    answers: tuple[Answer, ...]

    @property
    def tuned_right(self) -> int:
        """Right answers of the tuned model."""
        return sum(answer.tuned_is_right for answer in self.answers)

    @property
    def base_right(self) -> int:
        """Right answers of the base."""
        return sum(answer.base_is_right for answer in self.answers)
