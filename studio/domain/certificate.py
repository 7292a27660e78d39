"""Certificate of a Merge: what was measured, and whether it holds.

Three questions, from sharp to blunt. Which tensors changed? Does each of them carry the change
that the Adapter means? Does the merged model, loaded as anyone loads it, speak as base + Adapter?
"""

from typing import Literal

from pydantic import Field

from studio.domain.section import Section

# Share of the Adapter's change that a re-read tensor carries: <merged - base, change> over
# <change, change>. Rounding to 16 bits is noise that has no direction, so it hardly moves this
# share, however small the change is; a lost change gives 0, a wrong scale the ratio of the scales.
#
# Measured: the three tiny families, bfloat16 base, LoRA of rank 32 on all targets after 80 steps
# at learning rate 5e-3 (L) or 2e-4 (S), the 8 prompts of workers/certify.py, model computed in
# float32 or bfloat16. tests/workers/test_merge.py measures again and loses changes on purpose.
#                                    honest merge       one tensor lost     all lost
#   share kept of a tensor           0.998 .. 1.001     0 (that tensor)     0
#   mean KL in nats      L float32   2e-6 .. 4e-6       2e-6 .. 0.05        0.20 .. 0.23
#                        L bfloat16  2e-5 .. 9e-5       2e-5 .. 0.05        0.20 .. 0.23
#                        S float32   1e-6 .. 1e-4       1e-6 .. 0.007       0.027 .. 0.038
#                        S bfloat16  9e-6 .. 3e-4       9e-6 .. 0.008       0.028 .. 0.038
#   worst logit difference (spreads) 0.03 .. 4.9        0.03 .. 19          14 .. 18
#   same favourite, all prompts      0.83 .. 0.997      0.35 .. 0.999       0
#   (of the honest merges: on their worst prompt)
# So the share finds one lost tensor, which no number read from logits can (the gates of a single
# delta net hardly speak); mean KL finds a model that behaves differently. The two last lines do
# not separate: a router between two near-equal experts, or two near-equal tokens, flips on
# rounding. They are shown and decide nothing. Not measured yet: published weights on a card.
MAX_DELTA_KEPT_ERROR = 0.1
MAX_MEAN_KL = 0.005


class PromptCheck(Section):
    """Adapter and merged model on one prompt.

    Attributes:
        num_tokens: Positions compared.
        mean_kl: Divergence KL(base + Adapter || merge) of the next token in nats, mean over
            positions.
        effect_kl: The same for the base without the Adapter, for scale: what the fine-tune does.
        max_logit_difference: Largest absolute difference of any logit at any position.
        logit_spread: Standard deviation of the adapter model's logits, for scale.
        top1_agreement: Share of positions at which both prefer the same token, 0 to 1.
    """

    prompt: str
    num_tokens: int = Field(ge=1)
    mean_kl: float = Field(ge=0)
    effect_kl: float = Field(ge=0)
    max_logit_difference: float = Field(ge=0)
    logit_spread: float = Field(ge=0)
    top1_agreement: float = Field(ge=0, le=1)


class Certificate(Section):
    """The proofs of a Merge, written beside the weights.

    Attributes:
        delta_kept: Share of the Adapter's change that each targeted tensor carries, as re-read
            from the disk and compared with PEFT's own product of the Adapter; 1 is all of it.
    """

    version: Literal[1] = 1
    base_model: str
    base_revision: str | None = None
    adapter_sha256: str
    dtype: str
    targeted_tensors: tuple[str, ...]
    changed_tensors: tuple[str, ...]
    delta_kept: dict[str, float]
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
    def distorted_tensors(self) -> tuple[str, ...]:
        """Tensors that changed, but not by what the Adapter means."""
        return tuple(
            sorted(
                name
                for name in set(self.targeted_tensors) & set(self.changed_tensors)
                if abs(self.delta_kept.get(name, 0.0) - 1) > MAX_DELTA_KEPT_ERROR
            )
        )

    @property
    def max_logit_difference(self) -> float:
        """Largest logit difference over all prompts."""
        return max(prompt.max_logit_difference for prompt in self.prompts)

    @property
    def top1_agreement(self) -> float:
        """Share of all positions at which both models prefer the same token."""
        return sum(p.top1_agreement * p.num_tokens for p in self.prompts) / self._num_positions

    @property
    def mean_kl(self) -> float:
        """Divergence of the merge from base + Adapter over all positions, in nats."""
        return sum(p.mean_kl * p.num_tokens for p in self.prompts) / self._num_positions

    @property
    def effect_kl(self) -> float:
        """Divergence of the base from base + Adapter over all positions, in nats."""
        return sum(p.effect_kl * p.num_tokens for p in self.prompts) / self._num_positions

    @property
    def _num_positions(self) -> int:
        return sum(prompt.num_tokens for prompt in self.prompts)

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not hold, one sentence each; empty when the Certificate passes."""
        found = []
        if self.missing_tensors:
            found.append(f"Not changed, though targeted: {_some(self.missing_tensors)}.")
        if self.unexpected_tensors:
            found.append(f"Changed, though not targeted: {_some(self.unexpected_tensors)}.")
        if self.distorted_tensors:
            shares = [f"{n} ({self.delta_kept.get(n, 0.0):.0%})" for n in self.distorted_tensors]
            found.append(f"Changed by another amount than the Adapter's: {_some(tuple(shares))}.")
        if self.mean_kl > MAX_MEAN_KL:
            found.append(
                f"The merge answers differently from base and Adapter: {self.mean_kl:.4f} nats a "
                f"token, at most {MAX_MEAN_KL} is rounding (the fine-tune itself makes "
                f"{self.effect_kl:.4f})."
            )
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return not self.failures


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
