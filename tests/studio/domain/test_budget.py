"""Memory budgets: published sizes, every preset, and plans that follow from a card."""

import itertools
import re
from typing import Any

import pytest

from studio.disk import TEMPLATES
from studio.domain.architecture import read_architecture
from studio.domain.budget import GIB, PART_TITLES, Budget, demand_of
from studio.domain.memory_state import nf4_bytes, optimizer_bytes, weight_bytes
from studio.domain.preset import load_models, load_presets
from studio.domain.recompute_plan import (
    choose_method,
    largest_tokens,
    least_budget,
    plan_recompute,
)
from studio.domain.spec import JobSpec, parse_spec
from studio.errors import InputError

MODELS = {model.id: model.config for model in load_models(TEMPLATES / "models").values()}
PRESETS = load_presets(TEMPLATES / "presets")
NEXT, DENSE = "Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3.5-27B"


def spec(model: str = DENSE, **changes: Any) -> JobSpec:
    values: dict[str, Any] = {
        "model": {"id": model},
        "data": {"max_length_tokens": 4096},
        "batch": {"micro_batch_size": 1, "packing": True},
        "optim": {"optimizer": "adamw_8bit"},
        "train": {"num_gpus": 1},
    }
    for section, fields in changes.items():
        before = values.get(section, {})
        values[section] = {**before, **fields} if isinstance(fields, dict) else fields
    return parse_spec(values)


def part(budget: Budget, name: str) -> int:
    return next((found.num_bytes for found in budget.parts if found.name == name), 0)


# ---- what is held all the time ----------------------------------------------------------------


def test_double_quantisation_costs_what_the_paper_says() -> None:
    # QLoRA, section 3: 0.127 bits a parameter for constants, beside 4 bits.
    packed, constants = nf4_bytes(2**30)
    assert packed == 2**29
    assert 8 * constants / 2**30 == pytest.approx(0.127, abs=0.0005)


@pytest.mark.parametrize(
    ("model", "gib_16", "gib_4"),
    # Counted from the published configurations by hand: 2 bytes a parameter; embeddings and head
    # in 2, all else in 0.516.
    [
        ("Qwen/Qwen3.5-9B", 16.7, 7.1),
        (DENSE, 50.1, 16.4),
        ("Qwen/Qwen3.5-35B-A3B", 64.6, 18.1),
        ("Qwen/Qwen3.5-122B-A10B", 227.4, 60.7),
        (NEXT, 148.4, 39.2),
    ],
)
def test_weights_of_the_published_models(model: str, gib_16: float, gib_4: float) -> None:
    architecture = read_architecture(MODELS[model])
    in_16 = weight_bytes(architecture, "lora", compute_bytes=2).total
    in_4 = weight_bytes(architecture, "qlora", compute_bytes=2).total
    assert in_16 / GIB == pytest.approx(gib_16, abs=0.06)
    assert in_4 / GIB == pytest.approx(gib_4, rel=0.01)


def test_optimizer_states() -> None:
    size = 2**20
    assert optimizer_bytes([size], "adamw") == 8 * size
    assert optimizer_bytes([size], "adamw_8bit") == optimizer_bytes([size], "paged_adamw_8bit")
    assert optimizer_bytes([size], "adamw_8bit") / size == pytest.approx(2.03, abs=0.005)
    assert optimizer_bytes([size], "ademamix_8bit") / size == pytest.approx(3.05, abs=0.005)
    assert optimizer_bytes([4095], "adamw_8bit") == 8 * 4095  # small tensors stay in float32


def test_routed_experts_are_most_of_the_adapter_unless_their_rank_is_divided() -> None:
    lora: dict[str, Any] = {"rank": 16, "targets": ["attention", "routed_experts"]}
    same = least_budget(MODELS[NEXT], spec(NEXT, lora=lora))
    divided = least_budget(MODELS[NEXT], spec(NEXT, lora={**lora, "expert_rank": "divided"}))
    # 138.4 M parameters a rank: 16 and 1 of them.
    assert part(same, "adapter") / 4 == pytest.approx(16 * 138.4e6, rel=0.01)
    assert part(same, "adapter") > 12 * part(divided, "adapter")


def test_cards_share_weights_and_states_but_not_activations() -> None:
    alone = least_budget(MODELS[DENSE], spec(optim={"optimizer": "adamw"}))
    shared = least_budget(MODELS[DENSE], spec(optim={"optimizer": "adamw"}, train={"num_gpus": 4}))
    for name in ("adapter", "gradients", "optimizer"):
        assert part(shared, name) == pytest.approx(part(alone, name) / 4, abs=4)
    # The constants of 4-bit weights stay whole on every card.
    assert part(alone, "weights") / 4 < part(shared, "weights") < part(alone, "weights") / 3.5
    assert part(shared, "activations") == part(alone, "activations")
    assert part(alone, "gathered") == 0
    assert part(shared, "gathered") > 2 * 2 * 248_320 * 5120  # embeddings and head, whole


def test_full_fine_tuning_holds_float32_and_gathers_16_bits() -> None:
    budget = full_9b("adamw")
    parameters = 8.954e9
    assert part(budget, "weights") == part(budget, "gradients")
    assert part(budget, "weights") == pytest.approx(4 * parameters, rel=0.001)
    assert part(budget, "optimizer") == pytest.approx(8 * parameters, rel=0.002)
    assert part(budget, "gathered") > 2 * 2 * 248_320 * 4096  # embeddings and head
    assert part(budget, "adapter") == 0


def test_full_fine_tuning_with_an_8_bit_optimizer_stays_in_16_bits() -> None:
    budget = full_9b("adamw_8bit")
    parameters = 8.954e9
    assert part(budget, "weights") == part(budget, "gradients")
    assert part(budget, "weights") == pytest.approx(2 * parameters, rel=0.001)
    assert part(budget, "optimizer") == pytest.approx(2.03 * parameters, rel=0.002)
    assert part(budget, "gathered") == 0


def full_9b(optimizer: str) -> Budget:
    wanted = spec("Qwen/Qwen3.5-9B", method="full", optim={"optimizer": optimizer})
    return least_budget(MODELS["Qwen/Qwen3.5-9B"], wanted)


def test_a_cpu_has_no_context_and_no_workspace_of_16_bits() -> None:
    budget = least_budget(MODELS["tiny/qwen3.5"], spec("tiny/qwen3.5", train={"num_gpus": 0}))
    assert part(budget, "context") == 0
    assert budget.cards == 0


# ---- presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_budget_that_its_cards_hold(name: str) -> None:
    preset = PRESETS[name]
    wanted = preset.job_spec()
    budget = choose_method(MODELS[wanted.model.id], wanted, None).budget
    assert budget.total_bytes == sum(found.num_bytes for found in budget.parts)
    assert {found.name for found in budget.parts} <= PART_TITLES.keys()
    least = least_budget(MODELS[wanted.model.id], wanted)
    assert 0 < least.total_bytes <= budget.total_bytes
    if preset.needs.gpu_memory_gib is not None and wanted.method != "full":
        # What others measured with their engines, or a preset computed, is never far below ours.
        # (Weights that all train are float32 here, and 16-bit in what others measured.)
        assert least.total_bytes < 1.15 * preset.needs.gpu_memory_gib * GIB


def test_the_goals_of_memory_are_within_reach() -> None:
    without_experts: dict[str, Any] = {"rank": 16, "targets": ["attention", "delta_net"]}
    next_80b = spec(NEXT, lora=without_experts, data={"max_length_tokens": 2048})
    assert least_budget(MODELS[NEXT], next_80b).total_bytes < 44 * GIB
    dense: dict[str, Any] = {"rank": 16, "targets": ["attention", "delta_net", "dense_mlp"]}
    assert least_budget(MODELS[DENSE], spec(lora=dense)).total_bytes < 26 * GIB


# ---- plans ------------------------------------------------------------------------------------


def test_a_larger_card_recomputes_fewer_layers_and_every_plan_fits() -> None:
    plans = [plan_recompute(MODELS[DENSE], spec(), gib * GIB) for gib in (26, 40, 60, 80, 140)]
    counts = [len(plan.recomputed) for plan in plans]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 3
    assert counts[-1] == 0
    for plan, gib in zip(plans, (26, 40, 60, 80, 140), strict=True):
        assert plan.fits(gib * GIB)
        assert plan.recomputed == tuple(range(len(plan.recomputed)))


def test_keeping_one_more_layer_would_not_fit() -> None:
    card = 48 * GIB
    plan = plan_recompute(MODELS[DENSE], spec(), card)
    assert 0 < len(plan.recomputed) < plan.num_layers
    kept = plan.num_layers - len(plan.recomputed)
    assert not demand_of(MODELS[DENSE], spec()).budget(kept + 1).fits(card)


def test_memory_grows_with_every_layer_that_is_kept() -> None:
    for model in (DENSE, NEXT):
        demand = demand_of(MODELS[model], spec(model))
        totals = [demand.budget(kept).total_bytes for kept in range(len(demand.layers.kept) + 1)]
        assert all(a <= b for a, b in itertools.pairwise(totals))


def test_the_spec_may_settle_it() -> None:
    config = MODELS[DENSE]
    everything = plan_recompute(config, spec(train={"recompute": "all"}), 140 * GIB)
    assert everything.plan == "all 64 layers recomputed"
    nothing = plan_recompute(config, spec(train={"recompute": "none"}), 200 * GIB)
    assert nothing.plan == "none of 64 layers recomputed"
    with pytest.raises(InputError, match="none of 64 layers recomputed") as refused:
        plan_recompute(config, spec(train={"recompute": "none"}), 48 * GIB)
    assert refused.value.hint == "Set recompute to auto."
    assert refused.value.field == "train.recompute"


def test_without_a_limit_nothing_is_recomputed() -> None:
    assert plan_recompute(MODELS[DENSE], spec(), None).recomputed == ()


@pytest.mark.parametrize(
    ("batch", "length", "field", "hint"),
    [
        (16, 2048, "batch.micro_batch_size", r"Set the micro-batch to \d+, and raise"),
        (1, 65_536, "data.max_length_tokens", r"At most [\d,]+ tokens fit"),
    ],
)
def test_what_is_too_large_is_refused_with_what_would_fit(
    batch: int, length: int, field: str, hint: str
) -> None:
    wanted = spec(batch={"micro_batch_size": batch}, data={"max_length_tokens": length})
    card = 32 * GIB
    with pytest.raises(InputError, match=r"but the card has 32\.0 GiB") as refused:
        plan_recompute(MODELS[DENSE], wanted, card)
    assert refused.value.field == field
    assert re.search(hint, refused.value.hint)
    tokens = largest_tokens(MODELS[DENSE], wanted, card)
    assert 0 < tokens < batch * length
    demand = demand_of(MODELS[DENSE], wanted, tokens=tokens)
    assert demand.budget(0).fits(card)
    more = demand_of(MODELS[DENSE], wanted, tokens=tokens + 64)
    assert not more.budget(0).fits(card)


def test_a_model_that_no_micro_batch_makes_small_enough_names_the_other_ways() -> None:
    wanted = spec(method="lora")
    with pytest.raises(InputError) as refused:
        plan_recompute(MODELS[DENSE], wanted, 40 * GIB)
    assert "No micro-batch fits the card: keep the base in 4 bits" in refused.value.hint
    assert refused.value.field == "method"


def test_auto_takes_16_bits_where_they_fit_and_says_why() -> None:
    auto = spec(method="auto")
    large = choose_method(MODELS[DENSE], auto, 140 * GIB)
    assert (large.method, large.budget.method) == ("lora", "lora")
    assert "stays in 16 bits" in large.reason
    small = choose_method(MODELS[DENSE], auto, 48 * GIB)
    assert (small.method, small.budget.method) == ("qlora", "qlora")
    assert "goes to 4 bits: in 16 bits the run would need" in small.reason
    assert small.budget.fits(48 * GIB)
    with pytest.raises(InputError, match="A micro-batch of 4,096 tokens needs"):
        choose_method(MODELS[DENSE], auto, 12 * GIB)


def test_a_method_that_the_spec_names_stays() -> None:
    for method in ("qlora", "lora", "full"):
        assert choose_method(MODELS[DENSE], spec(method=method), 600 * GIB).method == method


def test_targets_that_the_model_lacks_are_refused_as_elsewhere() -> None:
    with pytest.raises(InputError, match="routed_experts matches nothing"):
        plan_recompute(MODELS[DENSE], spec(lora={"targets": ["routed_experts"]}), 80 * GIB)
