"""The target tree of a model: what a LoRA could train, what it does, and what it never does."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from studio.domain.architecture import Architecture, read_architecture
from studio.domain.section import Section
from studio.domain.targets import (
    GROUP_TITLES,
    TIED,
    TIED_GROUPS,
    TargetGroup,
    TargetModule,
    modules_of,
    selected,
)

if TYPE_CHECKING:
    from studio.domain.lora_spec import LoraSpec

ADAPTER_BYTES = 4  # an Adapter is stored in float32


class Leaf(Section):
    """One module; `parameters` is what its LoRA would train."""

    name: str
    weights: int
    rank: int
    parameters: int
    is_selected: bool


class LayerBranch(Section):
    """The modules of a group in one layer; `layer` is None for embeddings and head."""

    layer: int | None
    leaves: tuple[Leaf, ...]


class GroupBranch(Section):
    """One target group of a model.

    Attributes:
        modules: How many modules it has.
        weights: Parameters of the base in them.
        parameters: What a LoRA on the whole group would train.
        selected_modules: How many of its modules the choice trains.
        selected_parameters: What it trains in them.
        note: What is odd about the choice here; empty when nothing is.
    """

    group: TargetGroup
    title: str
    modules: int
    weights: int
    parameters: int
    selected_modules: int
    selected_parameters: int
    note: str
    layers: tuple[LayerBranch, ...]

    @property
    def adapter_bytes(self) -> int:
        """Size of what is selected, in float32."""
        return ADAPTER_BYTES * self.selected_parameters


class NotTrained(Section):
    """A part of the checkpoint that no LoRA reaches, and why."""

    title: str
    reason: str


class TargetTree(Section):
    """What a LoRA would train in a model."""

    family: str
    num_layers: int
    weights: int
    groups: tuple[GroupBranch, ...]
    not_trained: tuple[NotTrained, ...]

    @property
    def selected_modules(self) -> int:
        """Modules that the choice trains."""
        return sum(branch.selected_modules for branch in self.groups)

    @property
    def selected_parameters(self) -> int:
        """Parameters that the choice trains."""
        return sum(branch.selected_parameters for branch in self.groups)

    @property
    def adapter_bytes(self) -> int:
        """Size of the Adapter, in float32."""
        return ADAPTER_BYTES * self.selected_parameters


def target_tree(config: Mapping[str, Any], lora: "LoraSpec") -> TargetTree:
    """Return the target tree of a model with a choice of LoRA marked in it.

    Args:
        config: A model's config.json, or the text part of one.
        lora: The choice.

    Raises:
        InputError: The model cannot be trained, or the choice does not fit it.
    """
    architecture = read_architecture(config)
    modules = modules_of(architecture)
    chosen = {module.name for module in selected(config, lora)}
    by_group: dict[TargetGroup, list[TargetModule]] = {}
    for module in modules:
        by_group.setdefault(module.group, []).append(module)
    return TargetTree(
        family=architecture.title,
        num_layers=len(architecture.layers),
        weights=sum(module.num_weights for module in modules),
        groups=tuple(
            _branch(group, by_group[group], chosen, lora)
            for group in TargetGroup
            if group in by_group
        ),
        not_trained=tuple(_not_trained(architecture)),
    )


def _branch(
    group: TargetGroup, modules: Sequence[TargetModule], chosen: set[str], lora: "LoraSpec"
) -> GroupBranch:
    trained = [module for module in modules if module.name in chosen]
    layers: dict[int | None, list[Leaf]] = {}
    for module in modules:
        leaf = Leaf(
            name=module.leaf,
            weights=module.num_weights,
            rank=module.lora_rank(lora),
            parameters=module.lora_parameters(lora),
            is_selected=module.name in chosen,
        )
        layers.setdefault(module.layer, []).append(leaf)
    return GroupBranch(
        group=group,
        title=GROUP_TITLES[group],
        modules=len(modules),
        weights=sum(module.num_weights for module in modules),
        parameters=sum(module.lora_parameters(lora) for module in modules),
        selected_modules=len(trained),
        selected_parameters=sum(module.lora_parameters(lora) for module in trained),
        note=_note(trained, lora),
        layers=tuple(
            LayerBranch(layer=layer, leaves=tuple(leaves)) for layer, leaves in layers.items()
        ),
    )


def _note(trained: Sequence[TargetModule], lora: "LoraSpec") -> str:
    for module in trained:
        side = min(module.in_features, module.out_features)
        if module.lora_rank(lora) > side:
            return (
                f"Rank {module.lora_rank(lora)} is more than {module.leaf} can use: its smaller "
                f"side is {side}."
            )
    return ""


def _not_trained(architecture: Architecture) -> list[NotTrained]:
    found = []
    if architecture.is_tied:
        found += [NotTrained(title=GROUP_TITLES[group], reason=TIED) for group in TIED_GROUPS]
    if architecture.mtp_layers:
        found.append(
            NotTrained(
                title="MTP (multi-token prediction)",
                reason="transformers does not load it for training; a merge takes it over from "
                "the base as it is.",
            )
        )
    if architecture.has_vision:
        found.append(
            NotTrained(
                title="Vision tower",
                reason="Text only for now: it is not loaded for training; a merge takes it over "
                "from the base as it is.",
            )
        )
    return found
