"""Target groups: what is counted from a config is what the real model has, nothing forgotten."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from studio.disk import TEMPLATES
from studio.domain.preset import KnownModel, load_models
from studio.domain.targets import (
    GROUP_TITLES,
    TargetGroup,
    TargetModule,
    count_by_group,
    select,
    target_modules,
    text_config,
)
from studio.errors import InputError

MODELS = load_models(TEMPLATES / "models")
TINY = [model for model in MODELS.values() if model.is_built_here]
# What no group holds: the head, and the shared expert's gate of one output. The router
# and the routed experts are parameters of their own, not linear layers.
LEFT_OUT = ("lm_head", "shared_expert_gate")

# Leaf names of each group, written down independently of the code under test.
LEAF_NAMES = {
    TargetGroup.ATTENTION: {"q_proj", "k_proj", "v_proj", "o_proj"},
    TargetGroup.DELTA_NET: {"in_proj_qkvz", "in_proj_qkv", "in_proj_z", "out_proj"},
    TargetGroup.DELTA_NET_GATES: {"in_proj_ba", "in_proj_b", "in_proj_a"},
    TargetGroup.DENSE_MLP: {"gate_proj", "up_proj", "down_proj"},
    TargetGroup.SHARED_EXPERT: {"gate_proj", "up_proj", "down_proj"},
}


def real_model(known: KnownModel) -> PreTrainedModel:
    """Build transformers' own model without memory for weights."""
    values = dict(known.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


@pytest.mark.parametrize("known", MODELS.values(), ids=MODELS.keys())
def test_targets_are_exactly_the_linear_layers_of_the_real_model(known: KnownModel) -> None:
    real = {
        name.removeprefix("model."): (module.in_features, module.out_features)
        for name, module in real_model(known).named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(LEFT_OUT)
    }
    targets = target_modules(known.config)

    assert {module.name: (module.in_features, module.out_features) for module in targets} == real
    assert len(targets) == len(real)


@pytest.mark.parametrize("known", MODELS.values(), ids=MODELS.keys())
def test_each_group_holds_its_own_modules(known: KnownModel) -> None:
    for module in target_modules(known.config):
        assert module.name.rsplit(".", 1)[1] in LEAF_NAMES[module.group]
        assert ("shared_expert" in module.name) == (module.group is TargetGroup.SHARED_EXPERT)


@pytest.mark.parametrize("known", TINY, ids=[model.id for model in TINY])
def test_counts_are_those_of_peft(known: KnownModel) -> None:
    modules = target_modules(known.config)
    groups = {module.group for module in modules}
    if known.config["model_type"] == "qwen3_next":
        # PEFT moves these to the routed experts: https://github.com/huggingface/peft/issues/3711
        groups.remove(TargetGroup.SHARED_EXPERT)
    chosen = select(modules, groups)
    names = [f"model.{module.name}" for module in chosen]
    tuned = get_peft_model(real_model(known), LoraConfig(r=16, target_modules=names))

    trained = sum(value.numel() for value in tuned.parameters() if value.requires_grad)
    assert trained == sum(count_by_group(chosen, 16).values())


# Millions of trainable parameters at rank 16: attention, DeltaNet, gates, dense MLP; and all
# parameters of the text model in millions. Counted once by PEFT and transformers on the published
# configs; the last column agrees with the names of the models.
REAL = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (4.1, 11.8, 1.2, None, 79_674),
    "Qwen/Qwen3.5-9B": (3.9, 11.0, 3.2, 25.2, 8_954),
    "Qwen/Qwen3.5-27B": (10.5, 29.1, 7.9, 69.2, 26_896),
    "Qwen/Qwen3.5-35B-A3B": (3.4, 10.8, 2.0, None, 34_661),
    "Qwen/Qwen3.5-122B-A10B": (7.3, 21.8, 3.6, None, 122_112),
}
# The shared expert with its gate of one output, which the group leaves out.
SHARED_WITH_GATE = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 7.5,
    "Qwen/Qwen3.5-35B-A3B": 6.2,
    "Qwen/Qwen3.5-122B-A10B": 11.8,
}


def millions(count: int) -> float:
    return round(count / 1e6, 1)


@pytest.mark.parametrize("name", REAL)
def test_counts_of_the_published_models(name: str) -> None:
    attention, delta_net, gates, dense, total = REAL[name]
    known = MODELS[name]
    counts = count_by_group(target_modules(known.config), 16)

    assert millions(counts[TargetGroup.ATTENTION]) == attention
    assert millions(counts[TargetGroup.DELTA_NET]) == delta_net
    assert millions(counts[TargetGroup.DELTA_NET_GATES]) == gates
    if dense is not None:
        assert millions(counts[TargetGroup.DENSE_MLP]) == dense
    if name in SHARED_WITH_GATE:
        gate = 16 * (known.config["hidden_size"] + 1) * known.config["num_hidden_layers"]
        assert millions(counts[TargetGroup.SHARED_EXPERT] + gate) == SHARED_WITH_GATE[name]
    assert round(real_model(known).num_parameters() / 1e6) == total


@given(st.integers(1, 1024), st.integers(1, 10**5), st.integers(1, 10**5))
def test_parameters_grow_in_proportion_to_the_rank(rank: int, rows: int, columns: int) -> None:
    module = TargetModule(
        name="layers.0.mlp.up_proj",
        group=TargetGroup.DENSE_MLP,
        in_features=columns,
        out_features=rows,
    )

    assert module.lora_parameters(rank) == rank * module.lora_parameters(1)
    assert module.lora_parameters(rank) == rank * columns + rows * rank


DENSE: dict[str, Any] = MODELS["tiny/qwen3.5"].config
MOE: dict[str, Any] = MODELS["tiny/qwen3.5-moe"].config


@given(st.sets(st.sampled_from(TargetGroup), min_size=1), st.sampled_from([DENSE, MOE]))
def test_selected_groups_add_up_or_a_missing_one_is_named(
    groups: set[TargetGroup], config: dict[str, Any]
) -> None:
    modules = target_modules(config)
    missing = groups - {module.group for module in modules}
    if missing:
        with pytest.raises(InputError, match="matches nothing in this model") as caught:
            select(modules, groups)
        assert all(group.value in caught.value.message for group in missing)
        assert caught.value.field == "lora.targets"
    else:
        counts = count_by_group(modules, 4)
        chosen = select(modules, groups)
        assert sum(module.lora_parameters(4) for module in chosen) == sum(
            counts[group] for group in groups
        )


def test_a_missing_group_is_answered_with_those_that_the_model_has() -> None:
    with pytest.raises(InputError) as caught:
        select(target_modules(MOE), [TargetGroup.DENSE_MLP])

    assert caught.value.message == "LoRA target dense_mlp matches nothing in this model."
    assert caught.value.hint == (
        "This model has: attention, delta_net, delta_net_gates, shared_expert."
    )


def test_the_layers_follow_the_pattern_that_the_config_states() -> None:
    turned = {**DENSE, "layer_types": ["full_attention", "linear_attention"] * 2}
    by_layer = {
        module.name.split(".")[1]: module.group
        for module in target_modules(turned)
        if module.name.endswith(("o_proj", "out_proj"))
    }

    assert by_layer == {
        "0": TargetGroup.ATTENTION,
        "1": TargetGroup.DELTA_NET,
        "2": TargetGroup.ATTENTION,
        "3": TargetGroup.DELTA_NET,
    }


def test_a_stated_interval_and_the_stated_layers_give_the_same_modules() -> None:
    without = {key: value for key, value in DENSE.items() if key != "layer_types"}

    assert target_modules(without) == target_modules(DENSE)
    assert target_modules({**without, "full_attention_interval": 4}) == target_modules(DENSE)


def test_a_vision_models_config_counts_as_its_text_part() -> None:
    whole = {"model_type": "qwen3_5", "text_config": DENSE, "vision_config": {"depth": 27}}

    assert text_config(whole) == DENSE
    assert target_modules(whole) == target_modules(DENSE)


def test_an_architecture_that_is_not_trained_here_is_named() -> None:
    with pytest.raises(InputError) as caught:
        target_modules({"model_type": "llama"})

    assert caught.value.message == "The model is of type 'llama', which the studio does not train."
    assert caught.value.field == "model.id"


def test_a_config_without_a_size_names_the_size() -> None:
    broken = {key: value for key, value in DENSE.items() if key != "head_dim"}

    with pytest.raises(InputError) as caught:
        target_modules(broken)

    assert caught.value.message == "The model's config.json has no 'head_dim'."


def test_every_group_has_a_title() -> None:
    assert set(GROUP_TITLES) == set(TargetGroup)
