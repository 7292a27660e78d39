"""Proof of full fine-tuning: what moved, by group and layer, read back from the disk.

The written model is compared with its base, not the weights in memory: a change that is smaller
than the precision of the file is none for whoever loads it.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from studio.domain.proof import Proof
from studio.domain.targets import TargetGroup
from workers.engine.full import place_of
from workers.shards import find_shards, same_bits

NORMS = "norms"
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# First match wins.
_GROUPS = tuple(
    (re.compile(pattern), group)
    for pattern, group in (
        (r"(^|[._])(q_|k_|input_layer|post_attention_layer)?norm\.weight$", NORMS),
        (r"\.linear_attn\.norm\.", NORMS),
        (r"layernorm\.weight$", NORMS),
        (r"embed_tokens\.", TargetGroup.EMBEDDINGS),
        (r"^lm_head\.", TargetGroup.HEAD),
        (r"\.self_attn\.", TargetGroup.ATTENTION),
        (r"\.linear_attn\.in_proj_(a|b|ba)\.", TargetGroup.DELTA_NET_GATES),
        (r"\.linear_attn\.", TargetGroup.DELTA_NET),
        (r"\.mlp\.experts\.", TargetGroup.ROUTED_EXPERTS),
        (r"\.mlp\.gate\.", TargetGroup.ROUTER),
        (r"\.mlp\.shared_expert_gate\.", TargetGroup.SHARED_EXPERT_GATE),
        (r"\.mlp\.shared_expert\.", TargetGroup.SHARED_EXPERT),
        (r"\.mlp\.", TargetGroup.DENSE_MLP),
    )
)


@dataclass(slots=True)
class _Change:
    """Squared norms of changes and weights."""

    change: float = 0.0
    weight: float = 0.0
    tensors: int = 0
    still: list[str] = field(default_factory=list)

    @property
    def relative(self) -> float:
        if not self.weight:
            return math.inf if self.change else 0.0
        return math.sqrt(self.change / self.weight)


def group_of(parameter: str) -> str:
    """Return the group of a weight of the text model: a TargetGroup's value, or norms."""
    for pattern, group in _GROUPS:
        if pattern.search(parameter):
            return str(group)
    return "other"


def prove_full_learned(folder: Path, base_folder: Path) -> Proof:
    """Measure how far each group of weights is from the base: norm of change by norm of weight.

    Rank 0 alone calls it, after `save_full`.

    Args:
        folder: The model that was written.
        base_folder: What it was trained from.

    Returns:
        A Proof that fails when a group did not move, moved to numbers that are not finite, or
        when a tensor that does not train is not the base's bit for bit.
    """
    base, written = find_shards(base_folder), find_shards(folder)
    groups: dict[str, _Change] = {}
    layers: dict[str, dict[str, _Change]] = {}
    foreign = sorted(base.file_of.keys() ^ written.file_of.keys())
    for key in sorted(base.file_of.keys() & written.file_of.keys()):
        before, after = base.read(key), written.read(key)
        place = place_of(key)
        if place is None:
            if not same_bits(before, after):
                foreign.append(key)
            continue
        group = group_of(place.parameter)
        wholes = [groups.setdefault(group, _Change())]
        if match := _LAYER.search(place.parameter):
            wholes.append(layers.setdefault(match[1], {}).setdefault(group, _Change()))
        _add(wholes, key, before, after)
    return _proof(groups, layers, foreign)


def _add(wholes: Iterable[_Change], key: str, before: torch.Tensor, after: torch.Tensor) -> None:
    old, new = before.double(), after.double()
    change, weight = float((new - old).square().sum()), float(old.square().sum())
    for whole in wholes:
        whole.change += change
        whole.weight += weight
        whole.tensors += 1
        if not change > 0:
            whole.still.append(key)


def _proof(
    groups: dict[str, _Change], layers: dict[str, dict[str, _Change]], foreign: list[str]
) -> Proof:
    dead = [name for name, group in groups.items() if not group.change > 0]
    broken = [name for name, group in groups.items() if not math.isfinite(group.change)]
    told = ", ".join(f"{name} {group.relative:.2g}" for name, group in groups.items())
    if foreign:
        summary = f"{len(foreign)} tensors that do not train were changed, as {foreign[0]}."
    elif broken:
        summary = f"Not finite: {', '.join(broken)}."
    elif dead:
        summary = f"{', '.join(dead)} did not move; relative changes: {told}."
    else:
        summary = f"Every group moved; relative changes: {told}."
    details = {
        "relative_change": {name: _finite(group.relative) for name, group in groups.items()},
        "relative_change_by_layer": {
            layer: {name: _finite(group.relative) for name, group in found.items()}
            for layer, found in sorted(layers.items(), key=lambda item: int(item[0]))
        },
        "tensors": {name: group.tensors for name, group in groups.items()},
        "tensors_that_did_not_move": {
            name: len(group.still) for name, group in groups.items() if group.still
        },
        "first_that_did_not_move": {
            name: group.still[0] for name, group in groups.items() if group.still
        },
    }
    passed = not (dead or broken or foreign)
    return Proof(name="learned", passed=passed, summary=summary, details=details)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
