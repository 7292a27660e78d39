"""Architectures: read whole or refused with everything that is wrong; weights are held to them."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.disk import TEMPLATES
from studio.domain.architecture import FAMILIES, Mixer, read_architecture, text_config
from studio.domain.preset import load_models
from studio.domain.shapes import check_shapes, tensor_shapes
from studio.errors import InputError

MODELS = load_models(TEMPLATES / "models")
TINY = {model.config["model_type"]: model.config for model in MODELS.values() if model.vocab_size}
DENSE: dict[str, Any] = TINY["qwen3_5_text"]
NEXT: dict[str, Any] = TINY["qwen3_next"]
QWEN3: dict[str, Any] = TINY["qwen3"]
QWEN3_MOE: dict[str, Any] = TINY["qwen3_moe"]


def refusal(config: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read_architecture(config)
    assert caught.value.field == "model.id"
    assert caught.value.hint
    return caught.value


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


# ---- what is read -----------------------------------------------------------------------------


def test_every_family_has_a_tiny_member() -> None:
    assert set(TINY) == set(FAMILIES)


def test_a_published_whole_config_is_read_to_the_last_size() -> None:
    found = read_architecture(MODELS["Qwen/Qwen3.5-122B-A10B"].config)

    assert found.family == "qwen3_5_moe_text"
    assert [layer.mixer for layer in found.layers].count(Mixer.ATTENTION) == 12
    assert (len(found.layers), found.hidden, found.vocabulary) == (48, 3072, 248320)
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (32, 2, 256)
    assert found.delta_net is not None
    assert (found.delta_net.num_key_heads, found.delta_net.num_value_heads) == (16, 64)
    assert (found.delta_net.key_dim, found.delta_net.conv_kernel) == (128, 4)
    assert found.experts is not None
    assert (found.experts.count, found.experts.top_k) == (256, 8)
    assert (found.experts.inner, found.experts.shared_inner) == (1024, 1024)
    assert (found.is_tied, found.has_vision, found.mtp_layers) == (False, True, 1)
    assert (found.max_positions, found.dense_inner, found.top_k) == (262144, None, 8)


def test_a_text_part_alone_has_no_vision_and_its_text_is_the_same() -> None:
    whole = MODELS["Qwen/Qwen3.5-9B"].config
    text = read_architecture(whole["text_config"])

    assert text_config(whole) == whole["text_config"]
    assert not text.has_vision
    assert tensor_shapes(text) == tensor_shapes(read_architecture(whole))


def test_qwen3_has_neither_gate_nor_delta_net_nor_shared_expert() -> None:
    found = read_architecture(QWEN3_MOE)

    assert not found.has_output_gate
    assert found.delta_net is None
    assert found.experts is not None
    assert found.experts.shared_inner is None
    assert all(layer.mixer is Mixer.ATTENTION for layer in found.layers)


@pytest.mark.parametrize("config", [NEXT, QWEN3_MOE], ids=["qwen3_next", "qwen3_moe"])
def test_single_layers_of_a_mixture_may_be_dense(config: dict[str, Any]) -> None:
    mixed = {**config, "intermediate_size": 512}

    def dense(**changes: Any) -> list[int]:
        layers = read_architecture({**mixed, **changes}).layers
        return [number for number, layer in enumerate(layers) if not layer.has_experts]

    assert dense() == []
    assert dense(mlp_only_layers=[0, 3]) == [0, 3]
    assert dense(decoder_sparse_step=2) == [0, 2]
    assert dense(decoder_sparse_step=2, mlp_only_layers=[1]) == [0, 1, 2]


def test_the_number_of_experts_is_found_under_the_name_that_transformers_writes() -> None:
    written = without({**QWEN3_MOE, "num_local_experts": 16}, "num_experts")

    assert read_architecture(written) == read_architecture(QWEN3_MOE)


def test_yarn_stretches_the_longest_sequence() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}

    assert read_architecture({**NEXT, "rope_scaling": rope}).max_positions == 4 * 4096
    assert read_architecture({**NEXT, "rope_parameters": rope}).max_positions == 4 * 4096
    assert "YaRN's factor 'x'" in refusal({**NEXT, "rope_scaling": rope | {"factor": "x"}}).message


def test_tied_embeddings_are_found_in_the_whole_config_too() -> None:
    whole = {"model_type": "qwen3_5", "text_config": without(DENSE, "tie_word_embeddings")}

    assert not read_architecture(whole).is_tied
    assert read_architecture({**whole, "tie_word_embeddings": True}).is_tied


# ---- what is refused --------------------------------------------------------------------------


def test_another_family_is_named_with_those_that_are_trained() -> None:
    found = refusal({"model_type": "llama"})

    assert found.message == "The model is of type 'llama', which the studio does not train."
    assert found.hint == f"Choose one of: {', '.join(FAMILIES)}."
    assert "type None" in refusal({}).message
    assert "type None" in refusal({"text_config": 3}).message


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}},
        {"model_type": "llava", "vision_config": {}},
        {"model_type": "qwen3_5_vision"},
    ],
    ids=lambda config: config["model_type"],
)
def test_what_is_made_for_pictures_is_told_so(config: dict[str, Any]) -> None:
    assert "text only for now" in refusal(config).message


def test_a_whole_config_without_its_text_part_is_named() -> None:
    assert "has no text_config of type 'qwen3_5_text'" in refusal({"model_type": "qwen3_5"}).message


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_that_is_missing_or_wrong_is_named(family: str) -> None:
    config = TINY[family]
    sizes = [key for key, value in config.items() if type(value) is int]
    assert len(sizes) > 6
    optional = {"head_dim"} if family == "qwen3_moe" else set[str]()
    read_architecture(without(config, *optional))
    for name in set(sizes) - optional:
        assert refusal(without(config, name)).message == f"The model's config.json has no {name!r}."
    odd: tuple[Any, ...] = (0, -1, 2.5, "16", True, [], 2**40, float("nan"))
    for wrong in odd:
        for name in sizes:
            assert (
                f"{name} is {wrong!r:.40}, not a whole" in refusal({**config, name: wrong}).message
            )
    two = refusal(without({**config, "vocab_size": 0}, "hidden_size", "num_attention_heads"))
    assert "has no 'hidden_size', 'num_attention_heads' and cannot be right" in two.message
    assert "vocab_size is 0" in two.message


LIES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (NEXT, {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value"),
    (
        NEXT,
        {"linear_num_key_heads": 3},
        "linear_num_value_heads 4 is no multiple of linear_num_key",
    ),
    (NEXT, {"num_experts_per_tok": 17}, "num_experts_per_tok 17 is more than num_experts 16"),
    (NEXT, {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
    (NEXT, {"layer_types": "full"}, "layer_types has 'full' entries for 4 layers"),
    (NEXT, {"layer_types": ["mamba"] * 4}, "layer_types names 'mamba'; a Qwen3-Next has"),
    (NEXT, {"layer_types": [["x"]] * 4}, "layer_types names ['x']"),
    (QWEN3, {"layer_types": ["linear_attention"] * 4}, "layer_types names 'linear_attention'"),
    (QWEN3, {"layer_types": ["sliding_attention"] * 4}, "layer_types names 'sliding_attention'"),
    (QWEN3, {"use_sliding_window": True}, "use_sliding_window is on"),
    (QWEN3_MOE, {"mlp_only_layers": [4]}, "mlp_only_layers [4] names layers that there are not"),
    (QWEN3_MOE, {"mlp_only_layers": 3}, "mlp_only_layers 3 names"),
    (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    (NEXT, {"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers is 1000000000"),
    (NEXT, {"full_attention_interval": 0, "layer_types": None}, "full_attention_interval is 0"),
    (DENSE, {"mtp_num_hidden_layers": -1}, "mtp_num_hidden_layers is -1"),
]


@pytest.mark.parametrize(("config", "lie", "words"), LIES, ids=[lie[2][:40] for lie in LIES])
def test_a_config_that_contradicts_itself_is_refused(
    config: dict[str, Any], lie: dict[str, Any], words: str
) -> None:
    read_architecture(config)
    assert words in refusal({**config, **lie}).message


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(
    st.sampled_from(sorted(TINY)),
    st.dictionaries(
        st.sampled_from(sorted({*NEXT, "mlp_only_layers", "rope_scaling", "text_config"})), ANY_JSON
    ),
)
def test_whatever_a_config_holds_it_is_read_or_refused(family: str, odd: dict[str, Any]) -> None:
    try:
        found = read_architecture({**TINY[family], **odd})
    except InputError:
        return
    assert all(size > 0 for shape in tensor_shapes(found).values() for size in shape)


# ---- weights against the config ---------------------------------------------------------------


def hub_names(config: dict[str, Any], prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    """Return shapes as hubs publish them: experts one by one, perhaps another prefix."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(read_architecture(config)).items():
        name = prefix + name.removeprefix("model.") if name.startswith("model.") else name
        if name.endswith("experts.gate_up_proj"):
            for expert in range(shape[0]):
                for part in ("gate", "up"):
                    path = f"{name.removesuffix('gate_up_proj')}{expert}.{part}_proj.weight"
                    found[path] = (shape[1] // 2, shape[2])
        elif name.endswith("experts.down_proj"):
            for expert in range(shape[0]):
                found[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = shape[1:]
        else:
            found[name] = shape
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_either_layout_fit_their_own_config(family: str) -> None:
    architecture = read_architecture(TINY[family])
    mtp = {"mtp.layers.0.mlp.experts.gate_up_proj": (1,), "model.visual.merger.norm.weight": (2,)}

    check_shapes(architecture, tensor_shapes(architecture))
    check_shapes(architecture, hub_names(TINY[family]))
    check_shapes(architecture, hub_names(TINY[family], "model.language_model.") | mtp)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [lambda c: tensor_shapes(read_architecture(c)), hub_names])
def test_the_first_tensor_that_is_missing_or_differs_is_named(
    family: str, layout: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]
) -> None:
    architecture, whole = read_architecture(TINY[family]), layout(TINY[family])
    for name in list(whole)[::7]:
        with pytest.raises(InputError, match="a download may be incomplete") as caught:
            check_shapes(architecture, {key: whole[key] for key in whole if key != name})
        assert f"lack the tensor {name}," in caught.value.message
        with pytest.raises(InputError) as caught:
            check_shapes(architecture, {**whole, name: (*whole[name][:-1], whole[name][-1] + 1)})
        assert caught.value.message.startswith(f"The tensor {name} is ")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_hidden_layers": 3, "layer_types": None, "full_attention_interval": 4}, "layers.3."),
        ({"num_experts": 8}, "experts.8.gate_proj"),
    ],
)
def test_weights_for_which_the_config_has_no_place_are_named(
    change: dict[str, Any], name: str
) -> None:
    architecture = read_architecture({**NEXT, **change})
    assert architecture.experts is not None
    router = (architecture.experts.count, architecture.hidden)
    # The router differs by itself, so it is cut to get past it.
    found = {
        path: router if path.endswith("mlp.gate.weight") else shape
        for path, shape in hub_names(NEXT).items()
    }
    with pytest.raises(InputError, match="has no place") as caught:
        check_shapes(architecture, found)
    assert name in caught.value.message


def test_layers_of_mtp_behind_the_last_are_passed_over() -> None:
    more = {**hub_names(NEXT), "model.layers.4.eh_proj.weight": (1, 1)}

    check_shapes(read_architecture({**NEXT, "num_nextn_predict_layers": 1}), more)
    with pytest.raises(InputError, match=r"model\.layers\.4\.eh_proj"):
        check_shapes(read_architecture(NEXT), more)


def test_a_tied_head_may_be_there_or_not_but_not_otherwise() -> None:
    tied = read_architecture({**QWEN3, "tie_word_embeddings": True})
    shapes = tensor_shapes(tied)

    assert "lm_head.weight" not in shapes
    check_shapes(tied, shapes)
    check_shapes(tied, shapes | {"lm_head.weight": shapes["model.embed_tokens.weight"]})
    with pytest.raises(InputError, match=r"The tensor lm_head\.weight is 1 x 2"):
        check_shapes(tied, shapes | {"lm_head.weight": (1, 2)})


def test_biases_of_the_attention_are_expected_where_the_config_has_them() -> None:
    biased = read_architecture({**QWEN3, "attention_bias": True})

    assert tensor_shapes(biased)["model.layers.0.self_attn.q_proj.bias"] == (256,)
    with pytest.raises(
        InputError, match=r"lack the tensor model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        check_shapes(biased, tensor_shapes(read_architecture(QWEN3)))


def test_known_configs_are_json() -> None:
    for known in MODELS.values():
        assert json.loads(json.dumps(known.config)) == known.config
