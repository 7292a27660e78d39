"""Target groups: which modules a LoRA may train, and how many parameters that makes.

Read from the model's configuration alone, so that the page can count without loading weights.
Module names and shapes are those of transformers 5 (modeling_qwen3_next, modeling_qwen3_5,
modeling_qwen3_5_moe, modeling_qwen3, modeling_qwen3_moe); a test compares them with a real model
of each family, and the counts with PEFT.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from studio.domain.architecture import Architecture, read_architecture
from studio.domain.shapes import tensor_shapes
from studio.errors import InputError

if TYPE_CHECKING:
    from studio.domain.lora_spec import LoraSpec


class TargetGroup(StrEnum):
    """A named set of modules that LoRA may train."""

    ATTENTION = "attention"
    DELTA_NET = "delta_net"
    DELTA_NET_GATES = "delta_net_gates"
    DENSE_MLP = "dense_mlp"
    SHARED_EXPERT = "shared_expert"
    SHARED_EXPERT_GATE = "shared_expert_gate"
    ROUTED_EXPERTS = "routed_experts"
    ROUTER = "router"
    EMBEDDINGS = "embeddings"
    HEAD = "head"


GROUP_TITLES = {
    TargetGroup.ATTENTION: "Attention (q, k, v, o)",
    TargetGroup.DELTA_NET: "Gated DeltaNet (in, z, out)",
    TargetGroup.DELTA_NET_GATES: "Gated DeltaNet gates (a, b)",
    TargetGroup.DENSE_MLP: "Dense MLP (gate, up, down)",
    TargetGroup.SHARED_EXPERT: "Shared expert (gate, up, down)",
    TargetGroup.SHARED_EXPERT_GATE: "Gate of the shared expert",
    TargetGroup.ROUTED_EXPERTS: "Routed experts (gate and up, down)",
    TargetGroup.ROUTER: "Router",
    TargetGroup.EMBEDDINGS: "Embeddings",
    TargetGroup.HEAD: "Head (lm_head)",
}
TIED_GROUPS = (TargetGroup.EMBEDDINGS, TargetGroup.HEAD)
TIED = "Head and embeddings are one tensor in this model, so a LoRA on one would change both."
Kind = Literal["linear", "embedding", "router", "experts"]

# Path inside a layer (or inside the model) of everything that holds a matrix that may be trained.
_GROUP_OF = {
    **dict.fromkeys((f"self_attn.{x}_proj" for x in "qkvo"), TargetGroup.ATTENTION),
    "linear_attn.in_proj_qkvz": TargetGroup.DELTA_NET,
    "linear_attn.in_proj_qkv": TargetGroup.DELTA_NET,
    "linear_attn.in_proj_z": TargetGroup.DELTA_NET,
    "linear_attn.out_proj": TargetGroup.DELTA_NET,
    "linear_attn.in_proj_ba": TargetGroup.DELTA_NET_GATES,
    "linear_attn.in_proj_b": TargetGroup.DELTA_NET_GATES,
    "linear_attn.in_proj_a": TargetGroup.DELTA_NET_GATES,
    "mlp.gate_proj": TargetGroup.DENSE_MLP,
    "mlp.up_proj": TargetGroup.DENSE_MLP,
    "mlp.down_proj": TargetGroup.DENSE_MLP,
    "mlp.shared_expert.gate_proj": TargetGroup.SHARED_EXPERT,
    "mlp.shared_expert.up_proj": TargetGroup.SHARED_EXPERT,
    "mlp.shared_expert.down_proj": TargetGroup.SHARED_EXPERT,
    "mlp.shared_expert_gate": TargetGroup.SHARED_EXPERT_GATE,
    "mlp.experts.gate_up_proj": TargetGroup.ROUTED_EXPERTS,
    "mlp.experts.down_proj": TargetGroup.ROUTED_EXPERTS,
    "mlp.gate": TargetGroup.ROUTER,
    "embed_tokens": TargetGroup.EMBEDDINGS,
    "lm_head": TargetGroup.HEAD,
}
_KIND_OF: dict[TargetGroup, Kind] = {
    TargetGroup.ROUTED_EXPERTS: "experts",
    TargetGroup.ROUTER: "router",
    TargetGroup.EMBEDDINGS: "embedding",
}
# Parameters without a module of their own: PEFT reaches them by target_parameters (ParamWrapper),
# which knows neither dropout nor DoRA.
_BARE = ("experts", "router")


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetModule:
    """One layer that LoRA may train.

    Attributes:
        name: Path inside the text model, as in `layers.3.self_attn.q_proj`; `lm_head` is the
            head's.
        in_features: Columns of its weight (of an embedding: its rows, one for each token).
        out_features: Rows of its weight (of an embedding: its columns).
        kind: linear is a module of its own; router and experts are bare parameters.
        num_experts: Weights of that size which are stacked in it; 1 for all but routed experts.
        top_k: Of the stacked weights, how many a token uses; 1 for all but routed experts.
    """

    name: str
    group: TargetGroup
    in_features: int
    out_features: int
    kind: Kind = "linear"
    num_experts: int = 1
    top_k: int = 1

    @property
    def full_name(self) -> str:
        """Path inside the whole base model, as in `model.layers.3.self_attn.q_proj`."""
        return self.name if self.group is TargetGroup.HEAD else f"model.{self.name}"

    @property
    def leaf(self) -> str:
        """Path inside its layer, as in `self_attn.q_proj`."""
        return self.name.split(".", 2)[2] if self.layer is not None else self.name

    @property
    def layer(self) -> int | None:
        """Number of its layer; None for embeddings and head."""
        return int(self.name.split(".", 2)[1]) if self.name.startswith("layers.") else None

    @property
    def num_weights(self) -> int:
        """Parameters of the base in it."""
        return self.num_experts * self.in_features * self.out_features

    def lora_rank(self, lora: "LoraSpec") -> int:
        """Return the rank of its LoRA; the experts of one token may share the rank."""
        if self.kind != "experts" or lora.expert_rank == "same":
            return lora.rank
        return max(1, lora.rank // self.top_k)

    def lora_alpha(self, lora: "LoraSpec") -> float:
        """Return the alpha of its LoRA: alpha / rank is the same in every group."""
        rank = self.lora_rank(lora)
        return lora.alpha if rank == lora.rank else lora.alpha * rank / lora.rank

    def lora_parameters(self, lora: "LoraSpec") -> int:
        """Return what trains in it: A (rank x in), B (out x rank), DoRA's length of each row.

        LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353, as PEFT 0.21 holds it.
        """
        rank = self.lora_rank(lora)
        lengths = self.out_features if lora.dora else 0
        return self.num_experts * (rank * (self.in_features + self.out_features) + lengths)


def target_modules(config: Mapping[str, Any]) -> list[TargetModule]:
    """List everything that LoRA may train, in the order of the model.

    Args:
        config: A model's config.json, or the text part of one.

    Raises:
        InputError: The architecture is unknown or the config cannot be right.
    """
    return modules_of(read_architecture(config))


def modules_of(architecture: Architecture) -> list[TargetModule]:
    """List everything that LoRA may train; embeddings and head only where they are apart."""
    modules = []
    for tensor, shape in tensor_shapes(architecture).items():
        name = tensor.removeprefix("model.").removesuffix(".weight")
        leaf = name.split(".", 2)[2] if name.startswith("layers.") else name
        group = _GROUP_OF.get(leaf)
        if group is None or (architecture.is_tied and group in TIED_GROUPS):
            continue
        rows, columns = shape[-2:]
        kind = _KIND_OF.get(group, "linear")
        is_stacked = kind == "experts"
        modules.append(
            TargetModule(
                name=name,
                group=group,
                in_features=rows if kind == "embedding" else columns,
                out_features=columns if kind == "embedding" else rows,
                kind=kind,
                num_experts=shape[0] if is_stacked else 1,
                top_k=architecture.top_k if is_stacked else 1,
            )
        )
    return modules


def lora_parameters(modules: Iterable[TargetModule], lora: "LoraSpec") -> int:
    """Return all parameters that a LoRA on `modules` trains."""
    return sum(module.lora_parameters(lora) for module in modules)


def count_by_group(modules: Iterable[TargetModule], lora: "LoraSpec") -> dict[TargetGroup, int]:
    """Return trainable parameters of each group that `modules` has, in the form's order."""
    counts: dict[TargetGroup, int] = {}
    for module in modules:
        counts[module.group] = counts.get(module.group, 0) + module.lora_parameters(lora)
    return {group: counts[group] for group in TargetGroup if group in counts}


def select(modules: Iterable[TargetModule], groups: Iterable[TargetGroup]) -> list[TargetModule]:
    """Return the modules of `groups`.

    Raises:
        InputError: A group matches nothing in this model.
    """
    modules, groups = list(modules), list(groups)
    present = {module.group for module in modules}
    missing = [group.value for group in groups if group not in present]
    if missing:
        there = ", ".join(group.value for group in TargetGroup if group in present)
        raise InputError(
            f"LoRA target {', '.join(missing)} matches nothing in this model.",
            f"This model has: {there}.",
            field="lora.targets",
        )
    return [module for module in modules if module.group in groups]


def selected(config: Mapping[str, Any], lora: "LoraSpec") -> list[TargetModule]:
    """Return what a LoRA trains in a model: its groups and its further layers, in their order.

    Args:
        config: A model's config.json, or the text part of one.
        lora: The choice.

    Raises:
        InputError: The model cannot be trained, a group or name matches nothing, or what is
            chosen does not go together.
    """
    architecture = read_architecture(config)
    modules = modules_of(architecture)
    tied = [group.value for group in TIED_GROUPS if group in lora.targets]
    if architecture.is_tied and tied:
        raise InputError(
            f"LoRA target {', '.join(tied)} cannot be trained in this model. {TIED}",
            "Leave it out, or train all weights with method full.",
            field="lora.targets",
        )
    chosen = {module.name for module in select(modules, lora.targets)}
    chosen |= {module.name for module in _named(modules, architecture, lora.modules)}
    found = [module for module in modules if module.name in chosen]
    _refuse_mixture(found, lora)
    return found


def _named(
    modules: Sequence[TargetModule], architecture: Architecture, names: Sequence[str]
) -> list[TargetModule]:
    found, missing = [], []
    for name in names:
        path = _path(name)
        if architecture.is_tied and path in ("embed_tokens", "lm_head"):
            raise InputError(
                f"The layer {name!r} cannot be trained in this model. {TIED}",
                "Leave it out, or train all weights with method full.",
                field="lora.modules",
            )
        matches = [module for module in modules if _is_named(module, path)]
        found += matches
        if not matches:
            missing.append(name)
    if missing:
        leaves = dict.fromkeys(module.leaf for module in modules)
        raise InputError(
            f"No layer of this model is called {', '.join(map(repr, missing))}"
            f"{_why(missing, architecture)}.",
            f"This model has: {', '.join(leaves)}.",
            field="lora.modules",
        )
    return found


def _path(name: str) -> str:
    """Return a layer's path as a TargetModule has it, from how a checkpoint or PEFT writes it."""
    path = name.removesuffix(".weight")
    for prefix in ("base_model.model.", "model.", "language_model."):
        path = path.removeprefix(prefix)
    return path


def _is_named(module: TargetModule, path: str) -> bool:
    # The last name alone never reaches routed experts: `down_proj` means linear layers, and the
    # experts of that name hold a hundred times as much.
    if module.kind == "experts" and "." not in path:
        return False
    return module.name == path or module.name.endswith("." + path)


def _why(missing: Sequence[str], architecture: Architecture) -> str:
    if any("visual" in name or "vision" in name for name in missing) and architecture.has_vision:
        return "; its vision tower is not trained, text only for now"
    if any("mtp" in name.split(".") for name in missing) and architecture.mtp_layers:
        return "; its MTP layer is not loaded for training"
    return ""


def _refuse_mixture(modules: Sequence[TargetModule], lora: "LoraSpec") -> None:
    """Refuse what PEFT cannot do on the chosen modules, or what makes no sense there."""
    bare = _groups([module for module in modules if module.kind in _BARE])
    if lora.dropout > 0 and bare:
        raise InputError(
            f"Dropout {lora.dropout:g} cannot be used on {bare}, whose weights are bare parameters "
            "to PEFT.",
            "Set the dropout to 0, or leave these targets out.",
            field="lora.dropout",
        )
    undirected = _groups([module for module in modules if module.kind != "linear"])
    if lora.dora and undirected:
        raise InputError(
            f"DoRA cannot be used on {undirected}.",
            "Turn DoRA off, or leave these targets out.",
            field="lora.dora",
        )
    largest = max((min(m.in_features, m.out_features) for m in modules), default=lora.rank)
    if lora.rank > largest:
        raise InputError(
            f"Rank {lora.rank} is more than any chosen layer can use: the largest smaller side is "
            f"{largest}.",
            f"Choose a rank of at most {largest}.",
            field="lora.rank",
        )


def _groups(modules: Sequence[TargetModule]) -> str:
    present = {module.group for module in modules}
    return ", ".join(group.value for group in TargetGroup if group in present)
