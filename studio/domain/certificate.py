"""Certificate of a Merge: what was measured, and whether it holds."""

from typing import Literal

from pydantic import Field

from studio.domain.section import Section

# Rounding of the merged weights to 16 bits moves logits a little. bfloat16 keeps 8 significant
# bits (relative step 2**-8), so a difference of 5 % of the logits' spread is far above rounding
# and far below a lost delta; see tests/workers/test_merge.py, which loses one on purpose.
MAX_RELATIVE_LOGIT_DIFFERENCE = 0.05
MIN_TOP1_AGREEMENT = 0.95


class PromptCheck(Section):
    """Adapter and merged model on one prompt.

    Attributes:
        num_tokens: Positions compared.
        max_logit_difference: Largest absolute difference of any logit at any position.
        logit_spread: Standard deviation of the adapter model's logits, for scale.
        top1_agreement: Share of positions at which both prefer the same token, 0 to 1.
    """

    prompt: str
    num_tokens: int = Field(ge=1)
    max_logit_difference: float = Field(ge=0)
    logit_spread: float = Field(ge=0)
    top1_agreement: float = Field(ge=0, le=1)


class Certificate(Section):
    """The proofs of a Merge, written beside the weights."""

    version: Literal[1] = 1
    base_model: str
    base_revision: str | None = None
    adapter_sha256: str
    dtype: str
    targeted_tensors: tuple[str, ...]
    changed_tensors: tuple[str, ...]
    num_tensors: int = Field(ge=1)
    files: dict[str, str] = Field(description="Name and sha256 of every file of the merge.")
    prompts: tuple[PromptCheck, ...] = Field(min_length=1)
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def missing_tensors(self) -> tuple[str, ...]:
        """Tensors that the Adapter targets and the Merge did not change."""
        return tuple(sorted(set(self.targeted_tensors) - set(self.changed_tensors)))

    @property
    def unexpected_tensors(self) -> tuple[str, ...]:
        """Tensors that the Merge changed and the Adapter does not target."""
        return tuple(sorted(set(self.changed_tensors) - set(self.targeted_tensors)))

    @property
    def max_logit_difference(self) -> float:
        """Largest logit difference over all prompts."""
        return max(prompt.max_logit_difference for prompt in self.prompts)

    @property
    def top1_agreement(self) -> float:
        """Share of all positions at which both models prefer the same token."""
        tokens = sum(prompt.num_tokens for prompt in self.prompts)
        return sum(p.top1_agreement * p.num_tokens for p in self.prompts) / tokens

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not hold, one sentence each; empty when the Certificate passes."""
        found = []
        if self.missing_tensors:
            found.append(f"Not changed, though targeted: {_some(self.missing_tensors)}.")
        if self.unexpected_tensors:
            found.append(f"Changed, though not targeted: {_some(self.unexpected_tensors)}.")
        worst = max(p.max_logit_difference / max(p.logit_spread, 1e-9) for p in self.prompts)
        if worst > MAX_RELATIVE_LOGIT_DIFFERENCE:
            found.append(
                f"Logits differ by {worst:.1%} of their spread; "
                f"at most {MAX_RELATIVE_LOGIT_DIFFERENCE:.0%} is rounding."
            )
        if self.top1_agreement < MIN_TOP1_AGREEMENT:
            found.append(
                f"Adapter and merge prefer the same token at {self.top1_agreement:.1%} of "
                f"positions; at least {MIN_TOP1_AGREEMENT:.0%} is needed."
            )
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return not self.failures


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
