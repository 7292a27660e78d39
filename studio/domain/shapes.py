"""The tensors that an Architecture has, and what of them a checkpoint lacks."""

import re
from collections.abc import Iterator, Mapping

from studio.domain.architecture import Architecture, DeltaNet, Experts, Layer, Mixer
from studio.errors import InputError

Shape = tuple[int, ...]
# Whole models with a vision tower put one more name before the text model.
_TEXT_PREFIX = "model.language_model."
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_STACKED = re.compile(r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj$")


def tensor_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Return every parameter of the text model, named and shaped as transformers 5 holds it.

    Experts are stacked: gate_up_proj (experts, 2 inner, hidden), down_proj (experts, hidden,
    inner). The head is left out where it is the embeddings' own tensor.
    """
    a = architecture
    found: dict[str, Shape] = {"model.embed_tokens.weight": (a.vocabulary, a.hidden)}
    for number, layer in enumerate(a.layers):
        for name, shape in _layer(a, layer):
            found[f"model.layers.{number}.{name}"] = shape
    found["model.norm.weight"] = (a.hidden,)
    if not a.is_tied:
        found["lm_head.weight"] = (a.vocabulary, a.hidden)
    return found


def check_shapes(architecture: Architecture, shapes: Mapping[str, Shape]) -> None:
    """Compare the tensors of a checkpoint with its config.json, before any weight is loaded.

    Args:
        architecture: What the config.json says.
        shapes: Of every tensor in the safetensors headers, by its name there: with or without
            `language_model`, experts one by one or stacked. MTP and vision are passed over.

    Raises:
        InputError: A tensor is missing, has another shape, or belongs to a layer or expert that
            the config does not have; the first one is named.
    """
    found = {_text_name(name): tuple(shape) for name, shape in shapes.items()}
    expected = _as_stored(architecture, found)
    for name, shape in expected.items():
        if name not in found:
            raise InputError(
                f"The weights lack the tensor {name}, which the model's config.json asks for.",
                "Compare the folder with the published one; a download may be incomplete.",
                field="model.id",
            )
        if found[name] != shape:
            raise InputError(
                f"The tensor {name} is {_text(found[name])} in the weights, but "
                f"{_text(shape)} by the model's config.json.",
                "Use the config.json that was published with these weights.",
                field="model.id",
            )
    for name in found:
        layer = _LAYER.match(name)
        is_mtp = layer is not None and (
            len(architecture.layers)
            <= int(layer[1])
            < len(architecture.layers) + architecture.mtp_layers
        )
        if layer is not None and name not in expected and not is_mtp:
            raise InputError(
                f"The weights hold the tensor {name}, for which the model's config.json has no "
                "place.",
                "Use the config.json that was published with these weights.",
                field="model.id",
            )


def _text_name(name: str) -> str:
    return "model." + name.removeprefix(_TEXT_PREFIX) if name.startswith(_TEXT_PREFIX) else name


def _text(shape: Shape) -> str:
    return " x ".join(f"{size:,}" for size in shape) or "a single number"


def _as_stored(architecture: Architecture, found: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the tensors that must be there, experts in the layout that `found` has."""
    wanted = tensor_shapes(architecture)
    if architecture.is_tied and "lm_head.weight" in found:
        # Some files hold the same values twice.
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    if architecture.experts is None or any(map(_STACKED.match, found)):
        return wanted
    stored: dict[str, Shape] = {}
    for name, shape in wanted.items():
        if ".mlp.experts." not in name:
            stored[name] = shape
            continue
        stack, leaf = name.rsplit(".", 1)
        if leaf == "gate_up_proj":
            half: Shape = (shape[1] // 2, shape[2])
            single = {"gate_proj": half, "up_proj": half}
        else:
            single = {leaf: shape[1:]}
        for expert in range(shape[0]):
            for part, size in single.items():
                stored[f"{stack}.{expert}.{part}.weight"] = size
    return stored


def _layer(a: Architecture, layer: Layer) -> Iterator[tuple[str, Shape]]:
    if layer.mixer is Mixer.ATTENTION:
        yield from _attention(a)
    else:
        assert a.delta_net is not None
        yield from _delta_net(a, a.delta_net)
    if not layer.has_experts:
        assert a.dense_inner is not None
        yield from _gated("mlp", a.hidden, a.dense_inner)
    else:
        assert a.experts is not None
        yield from _mixture(a.hidden, a.experts)
    yield "input_layernorm.weight", (a.hidden,)
    yield "post_attention_layernorm.weight", (a.hidden,)


def _attention(a: Architecture) -> Iterator[tuple[str, Shape]]:
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    # With an output gate, q_proj computes query and gate at once.
    sizes = {
        "q_proj": (queries * (1 + a.has_output_gate), a.hidden),
        "k_proj": (keys, a.hidden),
        "v_proj": (keys, a.hidden),
        "o_proj": (a.hidden, queries),
    }
    for name, shape in sizes.items():
        yield f"self_attn.{name}.weight", shape
        if a.has_attention_bias:
            yield f"self_attn.{name}.bias", shape[:1]
    yield "self_attn.q_norm.weight", (a.head_dim,)
    yield "self_attn.k_norm.weight", (a.head_dim,)


def _delta_net(a: Architecture, delta: DeltaNet) -> Iterator[tuple[str, Shape]]:
    heads = delta.num_value_heads
    keys, values = delta.num_key_heads * delta.key_dim, heads * delta.value_dim
    yield "linear_attn.dt_bias", (heads,)
    yield "linear_attn.A_log", (heads,)
    yield "linear_attn.conv1d.weight", (2 * keys + values, 1, delta.conv_kernel)
    if a.family == "qwen3_next":
        yield "linear_attn.in_proj_qkvz.weight", (2 * keys + 2 * values, a.hidden)
        yield "linear_attn.in_proj_ba.weight", (2 * heads, a.hidden)
    else:
        yield "linear_attn.in_proj_qkv.weight", (2 * keys + values, a.hidden)
        yield "linear_attn.in_proj_z.weight", (values, a.hidden)
        yield "linear_attn.in_proj_b.weight", (heads, a.hidden)
        yield "linear_attn.in_proj_a.weight", (heads, a.hidden)
    yield "linear_attn.norm.weight", (delta.value_dim,)
    yield "linear_attn.out_proj.weight", (a.hidden, values)


def _mixture(hidden: int, experts: Experts) -> Iterator[tuple[str, Shape]]:
    yield "mlp.gate.weight", (experts.count, hidden)
    yield "mlp.experts.gate_up_proj", (experts.count, 2 * experts.inner, hidden)
    yield "mlp.experts.down_proj", (experts.count, hidden, experts.inner)
    if experts.shared_inner is not None:
        yield from _gated("mlp.shared_expert", hidden, experts.shared_inner)
        yield "mlp.shared_expert_gate.weight", (1, hidden)


def _gated(path: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.gate_proj.weight", (inner, hidden)
    yield f"{path}.up_proj.weight", (inner, hidden)
    yield f"{path}.down_proj.weight", (hidden, inner)
