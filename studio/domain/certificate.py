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
# With LoRA on routed experts too (16 of them, 2 a token; Qwen3-Next, Qwen3.5, Qwen3), the worst
# expert: carried 1.000; held 0.968 .. 0.994 at B 0.001, 0.998 .. 1.002 from 0.005 on; mean KL 0.006
# .. 0.053, effect 0.01 .. 1.8. A dropped expert carries 0, swapped ones less than 0.6.
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


def is_distorted(share: float) -> bool:
    """Return whether that share of a change is another one than rounding leaves."""
    return abs(share - 1) > MAX_DELTA_KEPT_ERROR


class Certificate(Section):
    """The proofs of a Merge, written beside the weights.

    In names, `*` stands for all experts of a layer that are in order; an expert at fault has a
    name of its own. One matrix of a stack of experts is `...experts.gate_up_proj[17, gate]`.

    Attributes:
        kind: `adapter`: base + Adapter. `full`: the model that a run has trained as a whole.
        adapter_sha256: Of an Adapter's weights.
        targeted_tensors: What the Adapter changes; of a whole model, what the training may change.
        delta_kept: Share of the Adapter's change, rounded to the precision of the weights, that
            each targeted matrix carries as re-read from the disk; 1 is all of it.
        delta_held: Share of the unrounded change that the precision of the weights can hold.
        idle_experts: Matrices of experts that the Adapter leaves as they are, because no token of
            the training met them.
        relative_change: Of a whole model: norm of the change over norm of the base, by tensor
            that changed; for `*` the largest.
        not_finite: Of a whole model: tensors that hold infinite values or no numbers.
        miswritten_tensors: Of a whole model: tensors that are not what the run wrote.
    """

    version: Literal[1] = 1
    kind: Literal["adapter", "full"] = "adapter"
    base_model: str
    base_revision: str | None = None
    adapter_sha256: str | None = None
    dtype: str
    targeted_tensors: tuple[str, ...]
    changed_tensors: tuple[str, ...]
    delta_kept: dict[str, float] = Field(default_factory=dict)
    delta_held: dict[str, float] = Field(default_factory=dict)
    idle_experts: int = Field(default=0, ge=0)
    relative_change: dict[str, float] = Field(default_factory=dict)
    not_finite: tuple[str, ...] = ()
    miswritten_tensors: tuple[str, ...] = ()
    num_tensors: int = Field(ge=1)
    files: dict[str, str] = Field(description="Name and sha256 of every file of the merge.")
    prompts: tuple[PromptCheck, ...] = Field(min_length=1)
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def missing_tensors(self) -> tuple[str, ...]:
        """Tensors that are targeted and did not change.

        A fault of an Adapter's Merge; in a whole model, a small update that its precision cannot
        hold looks like this, in norms for example.
        """
        return tuple(sorted(set(self.targeted_tensors) - set(self.changed_tensors)))

    @property
    def unexpected_tensors(self) -> tuple[str, ...]:
        """Tensors that changed and are not targeted."""
        return tuple(sorted(set(self.changed_tensors) - set(self.targeted_tensors)))

    @property
    def distorted_tensors(self) -> tuple[str, ...]:
        """Tensors, or matrices of experts, that changed, but not by what the Adapter means."""
        if self.kind == "full":
            return ()
        missing = set(self.missing_tensors)
        measured = {_tensor(name) for name in self.delta_kept}
        unmeasured = set(self.targeted_tensors) - missing - measured
        distorted = (name for name, share in self.delta_kept.items() if is_distorted(share))
        return tuple(sorted(unmeasured | {n for n in distorted if _tensor(n) not in missing}))

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
    def max_kl(self) -> float:
        """Divergence from which on the merge fails, in nats."""
        return max(MAX_MEAN_KL, MAX_KL_OF_EFFECT * self.effect_kl)

    @property
    def _num_positions(self) -> int:
        return sum(prompt.num_tokens for prompt in self.prompts)

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not hold, one sentence each; empty when the Certificate passes."""
        found = []
        if not self.changed_tensors:
            found.append("No tensor changed: this is the base.")
        if self.missing_tensors and self.kind == "adapter":
            found.append(f"Not changed, though targeted: {_some(self.missing_tensors)}.")
        if self.unexpected_tensors:
            found.append(f"Changed, though not targeted: {_some(self.unexpected_tensors)}.")
        if self.distorted_tensors:
            shares = [f"{n} ({self.delta_kept.get(n, 0.0):.0%})" for n in self.distorted_tensors]
            found.append(f"Changed by another amount than the Adapter's: {_some(tuple(shares))}.")
        if self.not_finite:
            found.append(f"Not finite: {_some(self.not_finite)}.")
        if self.miswritten_tensors:
            found.append(f"Not what the run wrote: {_some(self.miswritten_tensors)}.")
        if self.mean_kl > self.max_kl:
            found.append(
                f"The merge answers differently from base and Adapter: {self.mean_kl:.4f} nats a "
                f"token, at most {self.max_kl:.4g} is rounding (the fine-tune itself makes "
                f"{self.effect_kl:.4f})."
            )
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return not self.failures


def _tensor(name: str) -> str:
    """Return the tensor of which a name may say one matrix."""
    return name.partition("[")[0]


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
