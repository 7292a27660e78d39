"""Which layers are recomputed, and whether the base stays in 16 bits: chosen so that a card holds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from studio.domain.budget import GIB, Budget, Demand, demand_of
from studio.domain.spec import JobSpec
from studio.errors import InputError

# Micro-batches are suggested in multiples of it.
_TOKEN_STEP = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How a base is held, and why.

    Attributes:
        method: qlora, lora or full.
        reason: One sentence.
        budget: With the layers that are recomputed.
    """

    method: Literal["qlora", "lora", "full"]
    reason: str
    budget: Budget


def plan_recompute(config: Mapping[str, Any], spec: JobSpec, card_bytes: int | None) -> Budget:
    """Choose which layers are recomputed: as few as the card allows, or what the spec says.

    Args:
        config: A model's config.json, or the text part of one.
        spec: Its method is not auto.
        card_bytes: Memory of a card; None sets no limit, as on a CPU.

    Returns:
        The Budget of the choice.

    Raises:
        InputError: The run does not fit the card; the hint names what would.
    """
    demand = demand_of(config, spec)
    num_layers = len(demand.layers.kept)
    nothing, everything = demand.budget(num_layers), demand.budget(0)
    match spec.train.recompute:
        case "none":
            least = best = nothing
        case "all":
            least = best = everything
        case "auto":
            least = everything
            best = nothing if card_bytes is None else _as_few_as_fit(demand, card_bytes)
    if card_bytes is not None and not least.fits(card_bytes):
        raise _too_large(config, spec, least, card_bytes)
    return best


def _as_few_as_fit(demand: Demand, card_bytes: int) -> Budget:
    """Return the Budget with the most layers kept that fits; all recomputed when none does."""
    low, high = 0, len(demand.layers.kept)
    while low < high:
        middle = (low + high + 1) // 2
        if demand.budget(middle).fits(card_bytes):
            low = middle
        else:
            high = middle - 1
    return demand.budget(low)


def choose_method(config: Mapping[str, Any], spec: JobSpec, card_bytes: int | None) -> Choice:
    """Settle method auto: 16 bits where they fit the card, else 4 bits.

    Args:
        config: A model's config.json, or the text part of one.
        spec: Any; what is not auto is planned and kept.
        card_bytes: Memory of a card; None sets no limit, as on a CPU.

    Raises:
        InputError: Neither fits.
    """
    if spec.method != "auto":
        budget = plan_recompute(config, spec, card_bytes)
        return Choice(method=spec.method, reason="The spec asks for it.", budget=budget)
    in_16_bits = spec.model_copy(update={"method": "lora"})
    if card_bytes is None:
        return Choice(
            method="lora",
            reason="The base stays in 16 bits: the memory of the machine was not asked.",
            budget=plan_recompute(config, in_16_bits, None),
        )
    try:
        budget = plan_recompute(config, in_16_bits, card_bytes)
    except InputError:
        needed = least_budget(config, in_16_bits)
        budget = plan_recompute(config, spec.model_copy(update={"method": "qlora"}), card_bytes)
        return Choice(
            method="qlora",
            reason=f"The base goes to 4 bits: in 16 bits the run would need "
            f"{in_gib(needed.total_bytes)} of the card's {in_gib(card_bytes)}.",
            budget=budget,
        )
    return Choice(
        method="lora",
        reason=f"The base stays in 16 bits: the run needs {in_gib(budget.total_bytes)} of the "
        f"card's {in_gib(card_bytes)} ({budget.plan}).",
        budget=budget,
    )


def largest_tokens(config: Mapping[str, Any], spec: JobSpec, card_bytes: int) -> int:
    """Return the most tokens of a micro-batch that fit a card; a multiple of 64, or 0.

    Layers are recomputed as the spec says; auto recomputes all of them.
    """
    kept = spec.train.recompute == "none"
    low, high = 0, spec.batch.micro_batch_size * spec.data.max_length_tokens // _TOKEN_STEP
    while low < high:
        middle = (low + high + 1) // 2
        demand = demand_of(config, spec, tokens=middle * _TOKEN_STEP)
        if demand.budget(len(demand.layers.kept) if kept else 0).fits(card_bytes):
            low = middle
        else:
            high = middle - 1
    return low * _TOKEN_STEP


def in_gib(num_bytes: int) -> str:
    """Return a size as people read it, as in `47.3 GiB`."""
    return f"{num_bytes / GIB:.1f} GiB"


def least_budget(config: Mapping[str, Any], spec: JobSpec) -> Budget:
    """Return the Budget with the least memory: all layers recomputed unless the spec forbids it.

    Method auto is read as qlora.
    """
    if spec.method == "auto":
        spec = spec.model_copy(update={"method": "qlora"})
    demand = demand_of(config, spec)
    return demand.budget(len(demand.layers.kept) if spec.train.recompute == "none" else 0)


def _too_large(
    config: Mapping[str, Any], spec: JobSpec, least: Budget, card_bytes: int
) -> InputError:
    each = "each card" if least.cards > 1 else "the card" if least.cards else "the machine"
    message = (
        f"A micro-batch of {least.tokens:,} tokens needs {in_gib(least.total_bytes)} with "
        f"{least.plan}, but {each} has {in_gib(card_bytes)}."
    )
    if spec.train.recompute == "none" and least_budget(config, _recomputing(spec)).fits(card_bytes):
        return InputError(message, "Set recompute to auto.", field="train.recompute")
    tokens = largest_tokens(config, _recomputing(spec), card_bytes)
    rows = tokens // spec.data.max_length_tokens
    if rows:
        hint = f"Set the micro-batch to {rows}, and raise the gradient accumulation instead."
        return InputError(message, hint, field="batch.micro_batch_size")
    if tokens:
        hint = f"At most {tokens:,} tokens fit: set the micro-batch to 1 and the longest example to {tokens:,}."
        return InputError(message, hint, field="data.max_length_tokens")
    return InputError(message, _other_ways(spec, each), field="method")


def _recomputing(spec: JobSpec) -> JobSpec:
    train = spec.train.model_copy(update={"recompute": "auto"})
    return spec.model_copy(update={"train": train})


def _other_ways(spec: JobSpec, each: str) -> str:
    ways = {
        "full": "train a LoRA (method qlora or lora)",
        "lora": "keep the base in 4 bits (method qlora)",
    }
    ways_here = [ways[spec.method]] if spec.method in ways else []
    if spec.lora.expert_rank == "same" and any("expert" in t.value for t in spec.lora.targets):
        ways_here.append("divide the rank of the experts")
    ways_here.append("share the model among more cards, or choose a smaller one")
    return f"No micro-batch fits {each}: {'; '.join(ways_here)}."
