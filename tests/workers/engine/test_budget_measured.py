"""Predicted against measured memory.

Measured are bytes of live tensors at every operator, on a CPU in float32, at small shapes: every
family, with and without 4 bits and recomputing, at two lengths. Not measured: memory that kernels
take inside themselves, CUDA's own, sharding. The published shapes: test_budget_shapes.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit  # type: ignore[attr-defined]
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

import workers.engine.experts  # noqa: F401  # registers the experts function
from studio.domain.budget import Budget, demand_of
from studio.domain.memory_activations import LOSS_CHUNK_TOKENS
from studio.domain.spec import JobSpec, parse_spec
from studio.domain.targets import target_modules
from tests.workers.engine.live_memory import LiveMemory
from tests.workers.engine.small_models import CONFIGS, config_of, small_model
from workers.engine.batches import MicroBatch
from workers.engine.lora import add_adapter
from workers.engine.loss import CHUNK_TOKENS, batch_loss
from workers.engine.model import load_base
from workers.engine.optim import build_optimizer
from workers.engine.quantize import nf4_states
from workers.engine.recompute import apply_recompute

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Bytes: `passing` is the peak of a step above what is there all the time."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    passing: int


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each small model."""
    made = {}
    for family in CONFIGS:
        made[family] = tmp_path_factory.mktemp(family)
        small_model(family).save_pretrained(made[family])
    return made


def spec_of(
    family: str,
    method: str,
    tokens: int,
    recompute: str,
    *,
    optimizer: str = "adamw",
    rows: int = 1,
    dropout: float = 0.0,
) -> JobSpec:
    groups = {m.group.value for m in target_modules(config_of(family)) if m.layer is not None}
    values: dict[str, Any] = {
        "method": method,
        "lora": {"rank": 8, "targets": sorted(groups - {"router"}), "dropout": dropout},
        "data": {"max_length_tokens": tokens},
        "batch": {"micro_batch_size": rows},
        "optim": {"optimizer": optimizer},
        "train": {"recompute": recompute},
    }
    return parse_spec(values)


def predict(family: str, spec: JobSpec) -> Budget:
    demand = demand_of(config_of(family), spec)
    return demand.budget(0 if spec.train.recompute == "all" else len(demand.layers.kept))


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters, buffers and the constants of 4-bit weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        if isinstance(tensor, Params4bit):
            yield from constants_of(tensor.quant_state)
    for module in model.modules():
        for state in nf4_states(module).values():
            yield from constants_of(state)


def constants_of(state: QuantState) -> Iterator[torch.Tensor]:
    yield from (state.absmax, state.code, state.offset, state.state2.absmax)


def measure(model: PeftModel | PreTrainedModel, spec: JobSpec) -> Measured:
    """Take two steps and measure the second, in which gradients and optimizer state are there."""
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    optimizer = build_optimizer(model.named_parameters(), spec.optim)
    tokens = torch.randint(0, 512, (spec.batch.micro_batch_size, spec.data.max_length_tokens))
    mask = torch.ones_like(tokens)
    mask[1:, -1] = 0  # of rows of one length transformers leaves the mask out
    batch = MicroBatch(tokens=tokens, labels=tokens.clone(), mask=mask)
    live = LiveMemory(tensors_of(model))
    weights = live.now - adapter
    with live:
        batch_loss(model, batch, tokens.numel()).backward()  # type: ignore[no-untyped-call]
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        before = live.now
        optimizer.step()
        state = live.now - before
        always = live.now
        live.reset_peak()
        batch_loss(model, batch, tokens.numel()).backward()  # type: ignore[no-untyped-call]
    return Measured(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=state,
        passing=live.peak - always,
    )


CASES = [
    ("lora", "all", 128, {}),
    ("lora", "none", 256, {"optimizer": "adamw_8bit"}),
    ("qlora", "all", 256, {"optimizer": "ademamix_8bit"}),
    ("qlora", "none", 128, {}),
]
OTHERS = [
    ("full", "all", 128, {}),
    ("full", "none", 128, {}),
    ("lora", "none", 128, {"dropout": 0.1}),
    ("qlora", "all", 128, {"rows": 3}),
    ("lora", "none", 128, {"rows": 3}),
]


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *((family, case) for family in CONFIGS for case in CASES),
        *(("qwen3_5_text", case) for case in OTHERS),
        *((family, OTHERS[4]) for family in ("qwen3", "qwen3_5_moe_text")),
    ],
)
def test_the_budget_is_what_a_step_really_takes(
    folders: dict[str, Path], family: str, case: tuple[str, str, int, dict[str, Any]]
) -> None:
    method, recompute, tokens, rest = case
    spec = spec_of(family, method, tokens, recompute, **rest)
    base = load_base(folders[family], method=spec.method)  # type: ignore[arg-type]
    model = base.train() if method == "full" else add_adapter(base, spec.lora).train()
    apply_recompute(model, range(4) if recompute == "all" else ())
    found, budget = measure(model, spec), predict(family, spec)
    parts = {part.name: part.num_bytes for part in budget.parts}
    in_weights = found.adapter if method == "full" else 0
    assert parts.get("adapter", 0) == found.adapter - in_weights
    assert parts["weights"] == pytest.approx(found.weights + in_weights, rel=0.05)
    assert parts["gradients"] == found.gradients
    assert parts["optimizer"] == pytest.approx(found.optimizer, rel=0.05)
    passing = sum(parts.get(name, 0) for name in ("activations", "layer", "loss", "workspace"))
    # When this was written: from -1 to +6 % with all activations kept, and from -2 to +21 % where one
    # recomputed layer is the worst moment.
    # Padded rows have a mask, which costs 6 %: they must be told apart from rows without one.
    kept = 0.04 if spec.batch.micro_batch_size > 1 else 0.065
    assert passing == pytest.approx(found.passing, rel=0.25 if recompute == "all" else kept)


def test_the_loss_works_in_the_chunks_that_the_budget_counts() -> None:
    assert LOSS_CHUNK_TOKENS == CHUNK_TOKENS
