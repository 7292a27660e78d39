"""Schedules and optimizers."""

from typing import Literal

import pytest
import torch
from torch import nn

from studio.domain.spec import OptimSpec
from workers.engine.optim import build_optimizer, learning_rate_at, set_learning_rate

Schedule = Literal["cosine", "linear", "constant", "wsd"]
SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant", "wsd")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.5])
def test_the_rate_rises_to_its_peak_then_never_rises_again(
    schedule: Schedule, total_steps: int, warmup_ratio: float
) -> None:
    optim = OptimSpec(learning_rate=0.5, schedule=schedule, warmup_ratio=warmup_ratio)
    rates = [learning_rate_at(optim, step, total_steps) for step in range(1, total_steps + 1)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= 0.5 for rate in rates)
    assert max(rates) == 0.5
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_known_rates() -> None:
    cosine = OptimSpec(learning_rate=1.0, warmup_ratio=0.2)
    # 2 of 10 steps of warm-up; half way down the cosine at the fifth of the 8 others.
    assert [learning_rate_at(cosine, step, 10) for step in (1, 2, 3, 7)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.5]
    )
    linear = OptimSpec(learning_rate=1.0, warmup_ratio=0.0, schedule="linear")
    assert [learning_rate_at(linear, step, 4) for step in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
    wsd = OptimSpec(learning_rate=1.0, warmup_ratio=0.1, schedule="wsd", decay_ratio=0.4)
    assert [learning_rate_at(wsd, step, 10) for step in (1, 2, 6, 7, 8, 9, 10)] == pytest.approx(
        [1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    )


# bitsandbytes/optim/optimizer.py, get_state_buffer: on a CPU there is nothing to page.
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "ademamix_8bit"])
def test_each_optimizer_moves_what_trains_and_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    free, frozen = nn.Parameter(torch.randn(64, 128)), nn.Parameter(torch.randn(4, 4))
    frozen.requires_grad_(False)
    before, fixed = free.detach().clone(), frozen.clone()
    optimizer = build_optimizer(
        [("free", free), ("frozen", frozen)], OptimSpec.model_validate({"optimizer": name})
    )
    for rate in (0.01, 0.1):
        set_learning_rate(optimizer, rate)
        (free**2).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    # The first steps of Adam have the size of the learning rate.
    assert float((free.detach() - before).abs().median()) == pytest.approx(0.11, rel=0.1)
    assert torch.equal(frozen, fixed)


def test_with_a_loraplus_ratio_b_learns_that_much_faster_than_a() -> None:
    a, b = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(8, 4))
    named = [("q_proj.lora_A.default.weight", a), ("q_proj.lora_B.default.weight", b)]
    optimizer = build_optimizer(named, OptimSpec(learning_rate=1e-3, loraplus_ratio=16))
    set_learning_rate(optimizer, 1e-3)
    (a.sum() + b.sum()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert float(1 - a.detach().mean()) == pytest.approx(1e-3, rel=1e-3)
    assert float(1 - b.detach().mean()) == pytest.approx(16e-3, rel=1e-3)
