"""Target groups: which modules a LoRA may train, and how many parameters that makes.

Read from the model's configuration alone, so that the page can count without loading weights.
Module names and shapes are those of transformers 5 (modeling_qwen3_5, modeling_qwen3_5_moe,
modeling_qwen3_next); a test compares names and counts with PEFT on a real model of each family.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from studio.errors import InputError

FAMILIES = {
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_text": "Qwen3.5 (dense)",
    "qwen3_5_moe_text": "Qwen3.5 (mixture of experts)",
}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetModule:
    """One linear layer.

    Attributes:
        name: Path inside the text model, as in `layers.3.self_attn.q_proj`.
        in_features: Columns of its weight.
        out_features: Rows of its weight.
    """

    name: str
    group: TargetGroup
    in_features: int
    out_features: int

    def lora_parameters(self, rank: int) -> int:
        """Return the size of A (rank x in) and B (out x rank) together (LoRA, arXiv 2106.09685)."""
        return rank * (self.in_features + self.out_features)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config.json.

    Raises:
        InputError: The architecture is none of the families that the studio trains.
    """
    inner = config.get("text_config", config)
    kind = inner.get("model_type")
    if kind not in FAMILIES:
        raise InputError(
            f"The model is of type {kind!r}, which the studio does not train.",
            f"Choose one of: {', '.join(FAMILIES)}.",
            field="model.id",
        )
    return dict(inner)


def target_modules(config: Mapping[str, Any]) -> list[TargetModule]:
    """List every linear layer that LoRA may train, in the order of the model.

    Args:
        config: A model's config.json, or the text part of one.

    Raises:
        InputError: The architecture is unknown or the config lacks a size.
    """
    text = text_config(config)
    try:
        modules = []
        for layer in range(int(text["num_hidden_layers"])):
            for name, group, in_features, out_features in _layer(text, layer):
                modules.append(
                    TargetModule(
                        name=f"layers.{layer}.{name}",
                        group=group,
                        in_features=in_features,
                        out_features=out_features,
                    )
                )
    except KeyError as error:
        raise InputError(
            f"The model's config.json has no {error.args[0]!r}.",
            "Use the config.json that was published with the weights.",
            field="model.id",
        ) from error
    return modules


_Linear = tuple[str, TargetGroup, int, int]


def _layer(text: Mapping[str, Any], layer: int) -> list[_Linear]:
    mixer = _attention(text) if _layer_type(text, layer) == "full_attention" else _delta_net(text)
    return mixer + _feed_forward(text)


def _layer_type(text: Mapping[str, Any], layer: int) -> str:
    types = text.get("layer_types")
    if types:
        return str(types[layer])
    # Every fourth layer is full attention: default of full_attention_interval in all families.
    interval = int(text.get("full_attention_interval", 4))
    return "full_attention" if (layer + 1) % interval == 0 else "linear_attention"


def _attention(text: Mapping[str, Any]) -> list[_Linear]:
    hidden, head = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    group = TargetGroup.ATTENTION
    return [
        ("self_attn.q_proj", group, hidden, 2 * queries),  # query and output gate
        ("self_attn.k_proj", group, hidden, keys),
        ("self_attn.v_proj", group, hidden, keys),
        ("self_attn.o_proj", group, queries, hidden),
    ]


def _delta_net(text: Mapping[str, Any]) -> list[_Linear]:
    hidden = text["hidden_size"]
    heads = text["linear_num_value_heads"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = heads * text["linear_value_head_dim"]
    mixer, gates = TargetGroup.DELTA_NET, TargetGroup.DELTA_NET_GATES
    out: _Linear = ("linear_attn.out_proj", mixer, values, hidden)
    if text["model_type"] == "qwen3_next":
        return [
            ("linear_attn.in_proj_qkvz", mixer, hidden, 2 * keys + 2 * values),
            ("linear_attn.in_proj_ba", gates, hidden, 2 * heads),
            out,
        ]
    return [
        ("linear_attn.in_proj_qkv", mixer, hidden, 2 * keys + values),
        ("linear_attn.in_proj_z", mixer, hidden, values),
        ("linear_attn.in_proj_b", gates, hidden, heads),
        ("linear_attn.in_proj_a", gates, hidden, heads),
        out,
    ]


def _feed_forward(text: Mapping[str, Any]) -> list[_Linear]:
    hidden = text["hidden_size"]
    if text["model_type"] == "qwen3_5_text":
        return _gated(TargetGroup.DENSE_MLP, "mlp", hidden, text["intermediate_size"])
    inner = text["shared_expert_intermediate_size"]
    return _gated(TargetGroup.SHARED_EXPERT, "mlp.shared_expert", hidden, inner)


def _gated(group: TargetGroup, path: str, hidden: int, inner: int) -> list[_Linear]:
    return [
        (f"{path}.gate_proj", group, hidden, inner),
        (f"{path}.up_proj", group, hidden, inner),
        (f"{path}.down_proj", group, inner, hidden),
    ]


def count_by_group(modules: Iterable[TargetModule], rank: int) -> dict[TargetGroup, int]:
    """Return trainable parameters of each group that the model has, in the form's order."""
    counts: dict[TargetGroup, int] = {}
    for module in modules:
        counts[module.group] = counts.get(module.group, 0) + module.lora_parameters(rank)
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
