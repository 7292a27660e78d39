"""Certificate of a Merge: what was measured, and whether it holds.

Three questions, from sharp to blunt. Which tensors changed? Does each of them carry the change
that the Adapter means? Does the merged model, loaded as anyone loads it, speak as base + Adapter?
"""

from typing import Literal

from pydantic import Field

from studio.domain.section import Section

# What decides about a tensor is the share of its change that it carries as re-read from the disk:
# <merged - base, change> over <change, change>, where the change is PEFT's own product of the
# Adapter, rounded as 16 bits must round it. A lost change gives 0, a wrong scale the ratio of the
# scales. How much of the unrounded change 16 bits can hold is a figure of its own, that only
# informs: a small update falls below the last bit of large weights, in anyone's merge.
#
# What decides about the whole model is the KL of the next token over the 8 prompts of
# workers/certify.py. Rounding flips near-equal routing choices of experts, so that an honest merge
# of a mixture of experts is not silent; the limit stands above that and far below a lost change.
#
# Measured: the three tiny families, bfloat16 base, LoRA of rank 32 on all targets, entries of B of
# size 0.001 to 0.05 (after training at 5e-3: 0.015 to 0.035), float32 compute, two seeds each:
#                                      dense              experts            all lost
#   change carried, as rounded         1.000 .. 1.000     1.000 .. 1.000     0
#   change held by 16 bits, B 0.001    0.909 .. 0.998     0.912 .. 1.005
#                           B >= 0.005 0.995 .. 1.002     0.996 .. 1.004
#   mean KL in nats                    2e-4 .. 3e-4       0.007 .. 0.041     the effect
#   effect of the Adapter in nats      0.001 .. 1.4       0.04 .. 1.8
#   same favourite token               0.95 .. 0.98       0.78 .. 0.94
#   worst logit difference (spreads)   0.08 .. 0.17       1.5 .. 3.8
# The two last lines do not separate; they are shown and decide nothing. A single lost tensor is
# found by its share only: the gates of one delta net hardly speak. Not measured yet: published
# weights, and merges on a card.
MAX_DELTA_KEPT_ERROR = 0.02
MAX_MEAN_KL = 0.1
MAX_KL_OF_EFFECT = 0.1


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
        delta_kept: Share of the Adapter's change, rounded to the precision of the weights, that
            each targeted tensor carries as re-read from the disk; 1 is all of it.
        delta_held: Share of the unrounded change that the precision of the weights can hold.
    """

    version: Literal[1] = 1
    base_model: str
    base_revision: str | None = None
    adapter_sha256: str
    dtype: str
    targeted_tensors: tuple[str, ...]
    changed_tensors: tuple[str, ...]
    delta_kept: dict[str, float]
    delta_held: dict[str, float] = Field(default_factory=dict)
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
        limit = max(MAX_MEAN_KL, MAX_KL_OF_EFFECT * self.effect_kl)
        if self.mean_kl > limit:
            found.append(
                f"The merge answers differently from base and Adapter: {self.mean_kl:.4f} nats a "
                f"token, at most {limit:.4g} is rounding (the fine-tune itself makes "
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
