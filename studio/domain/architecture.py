"""What a config.json says that a model is made of, checked before anything is counted or loaded.

Sizes, names and defaults are those of the configuration and modelling files of transformers 5.23
(qwen3_next, qwen3_5, qwen3_5_moe, qwen3, qwen3_moe); a test builds every known model there and
compares. Not covered: sliding windows and configurations of other families, which are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from studio.errors import InputError

FAMILIES = {
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_text": "Qwen3.5 (dense)",
    "qwen3_5_moe_text": "Qwen3.5 (mixture of experts)",
    "qwen3": "Qwen3 (dense)",
    "qwen3_moe": "Qwen3 (mixture of experts)",
}
# Of a whole model with a vision tower: where its text part has a model_type of its own.
_WHOLE = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
_WITH_EXPERTS = {"qwen3_next", "qwen3_5_moe_text", "qwen3_moe"}
# Those in which single layers may have a dense MLP instead (mlp_only_layers, decoder_sparse_step).
_MIXED = {"qwen3_next", "qwen3_moe"}
_WITHOUT_DELTA_NET = {"qwen3", "qwen3_moe"}
_PUBLISHED = "Use the config.json that was published with the weights."
# Far above any published model, so that a wrong file cannot keep the page busy.
MAX_LAYERS, MAX_SIZE = 1000, 2**31 - 1


class Mixer(StrEnum):
    """How a layer mixes tokens; the values are those of `layer_types`."""

    ATTENTION = "full_attention"
    DELTA_NET = "linear_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer."""

    mixer: Mixer
    has_experts: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNet:
    """Sizes of a Gated DeltaNet; `conv_kernel` is in tokens."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Sizes of a mixture of experts.

    Attributes:
        count: Routed experts of a layer.
        top_k: Experts that a token uses.
        inner: Width of one.
        shared_inner: Width of the expert that every token uses; None where there is none.
    """

    count: int
    top_k: int
    inner: int
    shared_inner: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What a model is made of.

    Attributes:
        family: model_type of its text part, one of FAMILIES.
        hidden: Width of the residual stream.
        has_output_gate: Whether q_proj holds an output gate beside the query.
        has_attention_bias: Whether q, k, v, o have a bias each.
        delta_net: None where no layer has one.
        dense_inner: Width of the dense MLP; None where no layer has one.
        experts: None where no layer has any.
        is_tied: Whether the head is the embeddings' own tensor.
        max_positions: Longest sequence in tokens.
        mtp_layers: Layers that predict further tokens (MTP); in the checkpoint, never trained.
        has_vision: Whether the checkpoint holds a vision tower; never trained.
        dtype: Of the published weights; empty when the config does not say.
    """

    family: str
    layers: tuple[Layer, ...]
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_output_gate: bool
    has_attention_bias: bool
    delta_net: DeltaNet | None
    dense_inner: int | None
    experts: Experts | None
    vocabulary: int
    is_tied: bool
    max_positions: int
    mtp_layers: int
    has_vision: bool
    dtype: str

    @property
    def title(self) -> str:
        """Its family, as people call it."""
        return FAMILIES[self.family]

    @property
    def top_k(self) -> int:
        """Experts that a token uses; 1 in a dense model."""
        return self.experts.top_k if self.experts is not None else 1


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a config.json.

    Raises:
        InputError: The architecture is none of the families that the studio trains.
    """
    whole = config.get("model_type")
    inner = config.get("text_config", config)
    kind = inner.get("model_type") if isinstance(inner, Mapping) else None
    if isinstance(kind, str) and kind in FAMILIES:
        return dict(inner)
    if isinstance(whole, str) and whole in _WHOLE:
        raise InputError(
            f"The model's config.json is of type {whole!r} and has no text_config of type "
            f"{_WHOLE[whole]!r}.",
            _PUBLISHED,
            field="model.id",
        )
    families = ", ".join(FAMILIES)
    if config.get("vision_config") is not None or str(whole).endswith(
        ("_vl", "_vl_moe", "_vision")
    ):
        raise InputError(
            f"The model is of type {whole!r:.60}, which is made for pictures; text only for now.",
            f"Choose a model whose text part is one of: {families}.",
            field="model.id",
        )
    raise InputError(
        f"The model is of type {kind!r:.60}, which the studio does not train.",
        f"Choose one of: {families}.",
        field="model.id",
    )


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a model's config.json, or the text part of one.

    Raises:
        InputError: The architecture is unknown, a size is missing or is no size, or the config
            contradicts itself; everything that is wrong is named.
    """
    text = text_config(config)
    family = str(text["model_type"])
    sizes = _Sizes(text)
    layers = _layers(text, sizes, family)
    has_delta_net = any(layer.mixer is Mixer.DELTA_NET for layer in layers)
    has_dense = any(not layer.has_experts for layer in layers)
    has_experts = any(layer.has_experts for layer in layers)
    hidden = sizes.take("hidden_size")
    num_heads = sizes.take("num_attention_heads")
    # Qwen3MoeConfig has no head_dim of its own; its attention then divides the width.
    derived = max(1, hidden // num_heads) if family == "qwen3_moe" else None
    found = Architecture(
        family=family,
        layers=layers,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=sizes.take("num_key_value_heads"),
        head_dim=sizes.take("head_dim", default=derived),
        has_output_gate=family not in _WITHOUT_DELTA_NET,
        has_attention_bias=bool(text.get("attention_bias", False)),
        delta_net=_delta_net(sizes) if has_delta_net else None,
        dense_inner=sizes.take("intermediate_size") if has_dense else None,
        experts=_experts(sizes, family) if has_experts else None,
        vocabulary=sizes.take("vocab_size"),
        is_tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        max_positions=_max_positions(text, sizes),
        mtp_layers=_mtp_layers(text, sizes),
        has_vision=config.get("vision_config") is not None,
        dtype=str(text.get("dtype") or text.get("torch_dtype") or ""),
    )
    sizes.refuse_problems()
    _check_proportions(found, sizes)
    return found


def _check_proportions(found: Architecture, sizes: "_Sizes") -> None:
    delta, experts = found.delta_net, found.experts
    pairs = [("num_attention_heads", found.num_heads, "num_key_value_heads", found.num_kv_heads)]
    if delta is not None:
        values, keys = delta.num_value_heads, delta.num_key_heads
        pairs.append(("linear_num_value_heads", values, "linear_num_key_heads", keys))
    for name, value, by_name, by in pairs:
        if value % by:
            sizes.problems.append(f"{name} {value} is no multiple of {by_name} {by}")
    if experts is not None and experts.top_k > experts.count:
        sizes.problems.append(
            f"num_experts_per_tok {experts.top_k} is more than num_experts {experts.count}"
        )
    sizes.refuse_problems()


class _Sizes:
    """Takes sizes out of a config and remembers what is wrong, so that all of it is named."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._missing: list[str] = []
        self.problems: list[str] = []

    def take(
        self, *names: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE
    ) -> int:
        """Return the first of `names` that is there; `least` where it is missing or no size."""
        there = [name for name in names if self._values.get(name) is not None]
        if not there:
            if default is None and names[0] not in self._missing:
                self._missing.append(names[0])
            return least if default is None else default
        value = self._values[there[0]]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            problem = f"{there[0]} is {value!r:.40}, not a whole number from {least:,} to {most:,}"
            if problem not in self.problems:
                self.problems.append(problem)
            return least
        return value

    def refuse_problems(self) -> None:
        """Raise what was noted."""
        said = []
        if self._missing:
            said.append(f"has no {', '.join(repr(name) for name in self._missing)}")
        if self.problems:
            said.append(f"cannot be right: {'; '.join(self.problems)}")
        if said:
            raise InputError(
                f"The model's config.json {' and '.join(said)}.", _PUBLISHED, field="model.id"
            )


def _layers(text: Mapping[str, Any], sizes: _Sizes, family: str) -> tuple[Layer, ...]:
    count = sizes.take("num_hidden_layers", most=MAX_LAYERS)
    step = sizes.take("decoder_sparse_step", default=1)
    sizes.refuse_problems()  # what follows is counted in layers
    dense = text.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple) or any(
        isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < count for n in dense
    ):
        sizes.problems.append(f"mlp_only_layers {dense!r:.60} names layers that there are not")
        dense = []
    layers = []
    for number, mixer in enumerate(_mixers(text, sizes, family, count)):
        # As in Qwen3MoeDecoderLayer and Qwen3NextDecoderLayer.
        is_sparse = number not in dense and (number + 1) % step == 0
        has_experts = family in _WITH_EXPERTS and (is_sparse or family not in _MIXED)
        layers.append(Layer(mixer=mixer, has_experts=has_experts))
    return tuple(layers)


def _mixers(text: Mapping[str, Any], sizes: _Sizes, family: str, count: int) -> list[Mixer]:
    known = {Mixer.ATTENTION.value}
    if family not in _WITHOUT_DELTA_NET:
        known.add(Mixer.DELTA_NET.value)
    if text.get("use_sliding_window"):
        sizes.problems.append("use_sliding_window is on, which the studio does not train")
    types = text.get("layer_types")
    if types is None:
        # Every fourth layer is full attention: default of full_attention_interval.
        interval = sizes.take("full_attention_interval", default=4)
        if family in _WITHOUT_DELTA_NET:
            interval = 1
        return [
            Mixer.ATTENTION if (number + 1) % interval == 0 else Mixer.DELTA_NET
            for number in range(count)
        ]
    if not isinstance(types, list | tuple) or len(types) != count:
        length = len(types) if isinstance(types, list | tuple) else repr(types)[:40]
        sizes.problems.append(f"layer_types has {length} entries for {count} layers")
        return [Mixer.ATTENTION] * count
    unknown = [kind for kind in types if not isinstance(kind, str) or kind not in known]
    if unknown:
        sizes.problems.append(
            f"layer_types names {unknown[0]!r:.40}; a {FAMILIES[family]} has "
            f"{' and '.join(sorted(known))}"
        )
        return [Mixer.ATTENTION] * count
    return [Mixer(kind) for kind in types]


def _delta_net(sizes: _Sizes) -> DeltaNet:
    return DeltaNet(
        num_key_heads=sizes.take("linear_num_key_heads"),
        num_value_heads=sizes.take("linear_num_value_heads"),
        key_dim=sizes.take("linear_key_head_dim"),
        value_dim=sizes.take("linear_value_head_dim"),
        conv_kernel=sizes.take("linear_conv_kernel_dim"),
    )


def _experts(sizes: _Sizes, family: str) -> Experts:
    # transformers 5 writes qwen3_moe's num_experts as num_local_experts (its attribute_map).
    count = sizes.take("num_experts", "num_local_experts")
    has_shared = family != "qwen3_moe"
    return Experts(
        count=count,
        top_k=sizes.take("num_experts_per_tok"),
        inner=sizes.take("moe_intermediate_size"),
        shared_inner=sizes.take("shared_expert_intermediate_size") if has_shared else None,
    )


def _max_positions(text: Mapping[str, Any], sizes: _Sizes) -> int:
    longest = sizes.take("max_position_embeddings")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) != "yarn":
        return longest
    # YaRN (arXiv 2309.00071) stretches the positions of pre-training by its factor.
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings", longest)
    if not isinstance(factor, int | float) or not isinstance(original, int) or not factor >= 1:
        sizes.problems.append(f"YaRN's factor {factor!r:.40} on {original!r:.40} positions")
        return longest
    return max(longest, int(min(factor * original, MAX_SIZE)))


def _mtp_layers(text: Mapping[str, Any], sizes: _Sizes) -> int:
    if text.get("mtp_num_hidden_layers") is None and text.get("num_nextn_predict_layers") is None:
        return 0
    return sizes.take("mtp_num_hidden_layers", "num_nextn_predict_layers", least=0)
