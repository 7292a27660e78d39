"""Proofs of the Adapter pass on what is right and fail on what was broken on purpose."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.domain.lora_spec import LoraSpec
from studio.domain.targets import TargetGroup
from tests.workers.engine.small_bases import GROUPS, fill, save_base
from workers.engine.lora import add_adapter, base_of, lora_layers
from workers.engine.lora_proofs import prove_learned, prove_targets
from workers.engine.model import load_base
from workers.engine.quantize import expert_weight

ATTENTION_ONLY = (TargetGroup.ATTENTION,)
FAMILIES = tuple(GROUPS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a small base of each family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: save_base(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_counts_what_was_selected(family: str, bases: dict[str, Path]) -> None:
    lora = LoraSpec(rank=4, targets=GROUPS[family], expert_rank="divided")
    model = add_adapter(load_base(bases[family], method="qlora"), lora)
    proof = prove_targets(model, lora)
    assert proof.passed is True
    assert proof.details["trainable_parameters"] == model.num_parameters(only_trainable=True)
    groups = proof.details["groups"]
    assert list(groups) == [group.value for group in GROUPS[family]]
    assert sum(g["parameters"] for g in groups.values()) == proof.details["trainable_parameters"]
    json.dumps(proof.details)


def test_targets_fails_when_the_selection_is_not_what_was_wrapped(bases: dict[str, Path]) -> None:
    wrapped = LoraSpec(rank=4, targets=(TargetGroup.ATTENTION, TargetGroup.ROUTED_EXPERTS))
    model = add_adapter(load_base(bases["qwen3_next"], method="lora"), wrapped)
    more = wrapped.model_copy(update={"targets": (*wrapped.targets, TargetGroup.ROUTER)})
    less = wrapped.model_copy(update={"targets": ATTENTION_ONLY})
    wider = wrapped.model_copy(update={"rank": 8})
    divided = wrapped.model_copy(update={"expert_rank": "divided"})
    assert prove_targets(model, wrapped).passed is True
    assert len(prove_targets(model, more).details["missing"]) == 2
    assert len(prove_targets(model, less).details["unexpected"]) == 4
    assert len(prove_targets(model, divided).details["wrong_size"]) == 4
    for broken in (more, less, wider, divided):
        assert prove_targets(model, broken).passed is False


@pytest.mark.parametrize("group", [TargetGroup.ATTENTION, TargetGroup.ROUTED_EXPERTS])
def test_targets_fails_when_a_layer_is_frozen_or_something_else_trains(
    group: TargetGroup, bases: dict[str, Path]
) -> None:
    lora = LoraSpec(rank=4, targets=(group,))
    model = add_adapter(load_base(bases["qwen3_moe"], method="lora"), lora)
    layer = next(iter(lora_layers(model).values()))
    layer.lora_A.requires_grad_(False)
    assert prove_targets(model, lora).passed is False
    size = sum(parameter.numel() for parameter in layer.lora_A.parameters())
    model.register_parameter("ghost", torch.nn.Parameter(torch.zeros(size)))
    assert prove_targets(model, lora).passed is False  # though as much trains as shall
    del model.ghost
    layer.lora_A.requires_grad_(True)
    assert prove_targets(model, lora).passed is True
    embeddings: Any = model.get_input_embeddings()
    embeddings.weight.requires_grad_(True)
    assert prove_targets(model, lora).passed is False


def zero(model: Any, words: tuple[str, ...]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words) and (".lora_B" in name or "bedding_A" in name):
                parameter.zero_()


NAMES_OF = {
    TargetGroup.ATTENTION: ("self_attn",),
    TargetGroup.DELTA_NET: ("qkvz", "linear_attn.out_proj"),
    TargetGroup.ROUTED_EXPERTS: ("mlp.experts",),
    TargetGroup.ROUTER: ("mlp.gate.",),
    TargetGroup.EMBEDDINGS: ("embed_tokens",),
    TargetGroup.HEAD: ("lm_head",),
}


@pytest.mark.parametrize("dead", NAMES_OF)
def test_learned_names_the_group_that_did_not_learn(
    dead: TargetGroup, bases: dict[str, Path]
) -> None:
    lora = LoraSpec(rank=4, alpha=8, targets=tuple(NAMES_OF))
    model = add_adapter(load_base(bases["qwen3_next"], method="qlora"), lora)
    fresh = prove_learned(model, lora)
    assert fresh.passed is False
    assert fresh.summary.startswith(f"{', '.join(lora.targets)} did not learn")
    fill(model)
    assert prove_learned(model, lora).passed is True
    zero(model, NAMES_OF[dead])
    proof = prove_learned(model, lora)
    assert proof.passed is False
    assert proof.summary.startswith(f"{dead.value} did not learn: ")
    assert {name for name, share in proof.details["energy"].items() if not share} == {dead.value}
    assert json.loads(json.dumps(proof.details)) == proof.details


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_energy_is_the_norm_of_the_update_over_that_of_the_weight(
    method: Any, bases: dict[str, Path]
) -> None:
    groups = tuple(NAMES_OF)
    lora = LoraSpec(rank=4, alpha=12, targets=groups, expert_rank="divided")
    model = add_adapter(load_base(bases["qwen3_next"], method=method), lora)
    fill(model)
    shares = prove_learned(model, lora).details["layers"]
    assert list(shares) == ["model", "0", "1"]
    assert set(shares["model"]) == {"embeddings", "head"}
    updates, weights = 0.0, 0.0
    layers: Any = lora_layers(model)
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{leaf}"
        update = layers[name].get_delta_weight("default") if method == "lora" else None
        weight = expert_weight(layers[name].get_base_layer(), leaf, torch.float32)
        if update is None:
            a = layers[name].lora_A["default"].weight.view(8, -1, weight.shape[2])
            b = layers[name].lora_B["default"].weight.view(weight.shape[1], -1, 8)
            update = 3 * torch.einsum("ore,eri->eoi", b, a)
        updates += float(update.detach().square().sum())
        weights += float(weight.detach().square().sum())
    assert shares["1"]["routed_experts"] == pytest.approx((updates / weights) ** 0.5, rel=1e-4)
    head: Any = base_of(model).get_submodule("lm_head")
    expected = head.get_delta_weight("default").norm() / head.base_layer.weight.norm()
    assert shares["model"]["head"] == pytest.approx(float(expected.detach()), rel=1e-4)
    table: Any = base_of(model).get_input_embeddings()
    expected = table.get_delta_weight("default").norm() / table.base_layer.weight.norm()
    assert shares["model"]["embeddings"] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_energy_of_dora_counts_the_length_of_the_rows(bases: dict[str, Path]) -> None:
    lora = LoraSpec(rank=4, targets=ATTENTION_ONLY, dora=True)
    model = add_adapter(load_base(bases["qwen3_moe"], method="qlora"), lora)
    assert prove_learned(model, lora).details["energy"]["attention"] < 1e-6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.25)
    proof = prove_learned(model, lora)
    # B is zero: each row is its own direction, a quarter longer.
    assert proof.details["energy"]["attention"] == pytest.approx(0.25, rel=1e-3)


def test_experts_without_a_token_are_counted_and_not_failed(bases: dict[str, Path]) -> None:
    lora = LoraSpec(rank=4, alpha=8, targets=(TargetGroup.ROUTED_EXPERTS,))
    model = add_adapter(load_base(bases["qwen3_moe"], method="lora"), lora)
    fill(model)
    assert "have no update" not in prove_learned(model, lora).summary
    layers: Any = lora_layers(model)
    with torch.no_grad():
        for leaf in ("gate_up_proj", "down_proj"):
            b = layers[f"model.layers.0.mlp.experts.{leaf}"].lora_B["default"].weight
            b.view(b.shape[0], -1, 8)[..., [2, 5]] = 0
        b = layers["model.layers.1.mlp.experts.down_proj"].lora_B["default"].weight
        b.view(b.shape[0], -1, 8)[..., 0] = 0  # its other projection learned
    proof = prove_learned(model, lora)
    assert proof.passed is True
    assert " 2 of 16 routed experts have no update" in proof.summary
    assert proof.details["experts_that_did_not_learn"] == {"0": 2, "1": 0}


def test_an_update_larger_than_the_base_is_no_success(bases: dict[str, Path]) -> None:
    lora = LoraSpec(rank=4, targets=(TargetGroup.ATTENTION,))
    model = add_adapter(load_base(bases["qwen3_moe"], method="lora"), lora)
    fill(model)
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for factor in factors:
            factor.mul_(0.1)
    assert prove_learned(model, lora).passed is True
    with torch.no_grad():
        for factor in factors:
            factor.mul_(1e3)
    proof = prove_learned(model, lora)
    assert proof.passed is False
    assert proof.summary.endswith("In attention it is larger than the base itself: that is lost.")


def test_learned_fails_on_what_is_not_finite(bases: dict[str, Path]) -> None:
    lora = LoraSpec(rank=4, targets=(TargetGroup.ROUTED_EXPERTS,))
    model = add_adapter(load_base(bases["qwen3_moe"], method="lora"), lora)
    fill(model)
    layer: Any = next(iter(lora_layers(model).values()))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    proof = prove_learned(model, lora)
    assert proof.passed is False
    assert "routed_experts not finite" in proof.summary
    assert json.loads(json.dumps(proof.details, allow_nan=False)) == proof.details
