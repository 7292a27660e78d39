"""Forward and backward of one layer's routed experts with a LoRA on them, on one core.

    python benchmarks/experts.py [--rounds 9] [--quick]

Ours (the experts function "studio" with its split LoRA) beside PEFT's target_parameters over
transformers' grouped_mm, the fastest stock way on a CPU, and over its loop (eager, --eager). First
the gate: with the same random LoRA both sides give the same output and the same gradients of input,
routing weights, A and B. Then they take turns; time is that of the process, the best of all rounds
counts. The base is frozen float32; the row "none" is grouped_mm with neither LoRA nor gradient of
weights, what the base alone costs.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextExperts

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from workers.engine.expert_lora import ParamWrapper  # noqa: E402  # the line above finds it
from workers.engine.experts import IMPLEMENTATION  # noqa: E402

GOAL = 4.0
WEIGHTS = ("gate_up_proj", "down_proj")


class Point(NamedTuple):
    """A layer and the tokens that it gets."""

    experts: int
    tokens: int
    hidden: int = 512
    inner: int = 128
    top_k: int = 8
    rank: int = 8


GOAL_POINT = Point(experts=256, tokens=512)
POINTS = (
    Point(experts=64, tokens=64),
    Point(experts=64, tokens=512),
    Point(experts=64, tokens=2048),
    Point(experts=256, tokens=128),
    GOAL_POINT,
    Point(experts=256, tokens=2048),
)


class Layer(nn.Module):
    """Experts as a model holds them."""

    def __init__(self, point: Point, implementation: str) -> None:
        super().__init__()
        config: Any = Qwen3NextConfig(
            hidden_size=point.hidden,
            moe_intermediate_size=point.inner,
            num_experts=point.experts,
            num_experts_per_tok=point.top_k,
        )
        config._experts_implementation = implementation  # noqa: SLF001  # as from_config sets it
        self.experts = Qwen3NextExperts(config)  # type: ignore[no-untyped-call]
        generator = torch.Generator().manual_seed(1)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.02, generator=generator)
        self.requires_grad_(False)


def build(point: Point, implementation: str) -> Layer:
    """Return experts with a LoRA: PEFT's own layer, or ours by the same door of PEFT's."""
    layer = Layer(point, implementation)
    config = LoraConfig(
        r=point.rank,
        lora_alpha=2 * point.rank,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in WEIGHTS],
    )
    if implementation == IMPLEMENTATION:
        config._register_custom_module({Qwen3NextExperts: ParamWrapper})  # noqa: SLF001
    inject_adapter_in_model(config, layer)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in layer.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.05, generator=generator)
    return layer


def inputs(point: Point) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x (T, D), experts and their weights (T, K), and the gradient (T, D) that comes back."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(point.tokens, point.hidden, generator=generator)
    scores = torch.randn(point.tokens, point.experts, generator=generator)
    weights, index = scores.softmax(1).topk(point.top_k, dim=1)
    up = torch.randn(x.shape, generator=generator)
    return x.requires_grad_(), index, weights.requires_grad_(), up


def step(layer: Layer, point: Point) -> Callable[[], dict[str, torch.Tensor]]:
    """Return what runs forward and backward once and gives output and gradients by name."""
    x, index, weights, up = inputs(point)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    leaves = [x, weights, *trained.values()]

    def run() -> dict[str, torch.Tensor]:
        out = layer.experts(x, index, weights)
        grads = torch.autograd.grad(out, leaves, up)
        names = ["x", "routing weights", *trained]
        return {"output": out.detach(), **dict(zip(names, grads, strict=True))}

    return run


def gate(point: Point, sides: Mapping[str, Callable[[], dict[str, torch.Tensor]]]) -> float:
    """Check that all sides agree; return the worst relative difference."""
    worst = 0.0
    expected = sides["PEFT, grouped_mm"]()
    for side, run in sides.items():
        if side == "none":
            continue
        found = run()
        if found.keys() != expected.keys():
            raise SystemExit(f"{point}: {side} trains {sorted(found)}, not {sorted(expected)}.")
        for name, tensor in found.items():
            error = float((tensor - expected[name]).norm() / expected[name].norm())
            worst = max(worst, error)
            if not error < 1e-4:
                raise SystemExit(f"{point}: {name} of {side} differs by {error:.1e}.")
    return worst


def measure(point: Point, rounds: int, *, with_eager: bool) -> dict[str, Any]:
    """Time all sides in turn at one point."""
    sides = {
        "ours": step(build(point, IMPLEMENTATION), point),
        "PEFT, grouped_mm": step(build(point, "grouped_mm"), point),
        "none": step(Layer(point, "grouped_mm"), point),
    }
    if with_eager:
        sides["PEFT, eager"] = step(build(point, "eager"), point)
    error = gate(point, sides)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            start = time.process_time()
            run()
            seconds[side].append(time.process_time() - start)
    best = {side: min(times) for side, times in seconds.items()}
    return {
        **point._asdict(),
        "worst_difference": error,
        "milliseconds": {side: round(1000 * best[side], 1) for side in sides},
        "ratio": best["PEFT, grouped_mm"] / best["ours"],
        "ratio_eager": best["PEFT, eager"] / best["ours"] if with_eager else None,
    }


def main() -> None:
    """Measure all points and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=9, help="how often each side runs (7 or more)"
    )
    parser.add_argument("--quick", action="store_true", help="the point of the goal alone")
    parser.add_argument(
        "--eager", action="store_true", help="the loop, too: up to a minute a round"
    )
    given = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    print(f"Python {platform.python_version()}, {platform.machine()}, one core, {versions}")
    for point in (GOAL_POINT,) if given.quick else POINTS:
        result = measure(point, given.rounds, with_eager=given.eager and point == GOAL_POINT)
        print(json.dumps(result))
        goal = f" (goal: {GOAL:g})" if point == GOAL_POINT else ""
        print(f"  E{point.experts} T{point.tokens}: ratio {result['ratio']:.2f}{goal}", flush=True)


if __name__ == "__main__":
    main()
