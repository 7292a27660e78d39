"""Training steps of a whole model of real shape: tokens a second, memory, use of the card.

    python -m benchmarks.gpu.whole --model 80b [--tokens 8192] [--depth LAYERS] [--recompute auto]
        [--lengths chat] [--experts] [--method qlora] [--trl] [--out FOLDER] [--device cpu --tiny]

The model has random weights, drawn and quantised on the device (random_base.py); all else is the
engine's: the Preset's LoRA and optimizer, the budget and the layers that it has recomputed, packed
rows, varlen attention, loss, clipping. Before a time is taken, the engine's Proof that packed
documents do not see each other must pass, and each loss be finite. When memory runs out, it is tried
again with more layers recomputed. --trl measures TRL's SFTTrainer
afterwards, in a process of its own, on the same model and documents (stock.py).
"""

import math
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from benchmarks.gpu.clock import Times, matmul_rate, watched_card
from benchmarks.gpu.flops import step_flop
from benchmarks.gpu.plan import Run, batches_of, documents, options, plan, recompute_more
from benchmarks.gpu.random_base import build_base
from benchmarks.gpu.record import OUT_OF_MEMORY, Record, checked
from studio.domain.architecture import read_architecture
from studio.errors import StudioError
from workers.engine.batches import IGNORED, MicroBatch
from workers.engine.coverage import prove_coverage
from workers.engine.kernels import preflight
from workers.engine.leak import prove_leak
from workers.engine.lora import add_adapter
from workers.engine.loss import batch_loss
from workers.engine.optim import build_optimizer, learning_rate_at, set_learning_rate
from workers.engine.parallel import clip_gradients
from workers.engine.recompute import apply_recompute
from workers.engine.varlen import enable_packing

GIB = 2**30
# The dense bfloat16 rate that NVIDIA states for H100 and H200; papers divide by it.
NOMINAL_RATE = 989e12
_PROFILED_STEPS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one model; return 1 when it broke or a result is wrong."""
    given = checked(options(__doc__), argv)
    record = Record("whole", given)
    try:
        run = plan(record, given)
    except StudioError as error:
        record.row("refused", model=given.model, tokens=given.tokens, why=error.message)
        print(f"  {error.message} {error.hint}")
        return 0
    while record.attempt("whole", partial(measure, run), **run.settings) == OUT_OF_MEMORY:
        if not recompute_more(run):
            break
    if given.trl:
        # In its own process: this one's memory and lifted guards are not there.
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.stock",
            *(sys.argv[1:] if argv is None else argv),
        ]
        record.row("TRL beside it", exit_code=subprocess.run(command, check=False).returncode)
    return record.exit_code()


def measure(run: Run) -> None:
    """Build the model, gate it, take the steps, and say what they took."""
    record, device = run.record, run.record.device
    kernels = preflight(device)
    rate = matmul_rate(device)
    start = time.perf_counter()
    torch.manual_seed(run.spec.train.seed)
    base = build_base(run.config, run.method, device)
    settle(device)
    weights, coverage = _allocated(device), prove_coverage(base, run.method)
    model = add_adapter(base, run.spec.lora)
    apply_recompute(model, run.budget.recomputed)
    said = enable_packing(model)
    build_seconds = time.perf_counter() - start
    model.train()
    proof = prove_leak(model, batches_of(run, 0)[0])
    passed = proof.passed is not False and coverage.passed is not False
    record.row(
        "gate", **run.settings, passed=passed,
        more=[said, proof.summary, coverage.summary, kernels.model_dump(mode="json")],
    )  # fmt: skip
    if not passed and not run.given.ungated:
        return
    settle(device)
    steps = take_steps(run, model)
    allocated, reserved = peaks(device)
    seconds = steps.pop("seconds")
    times = Times.of([1000 * each for each in seconds]) if record.is_timed else None
    model_flop, executed_flop = steps["flop"]
    median = None if times is None else times.median / 1000
    record.row(
        "whole", **run.settings,
        step_s=median,
        tokens_per_s=None if median is None else steps["tokens"] / median,
        trainable_per_s=None if median is None else steps["supervised"] / median,
        allocated_gib=allocated, reserved_gib=reserved, budget_gib=run.budget.total_bytes / GIB,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        mfu=None if median is None or rate is None else model_flop / median / rate,
        use=None if median is None or rate is None else executed_flop / median / rate,
        # Only to the file.
        more=[{
            "mfu_of_989": None if median is None else model_flop / median / NOMINAL_RATE,
            "matmul_tflops": None if rate is None else rate / 1e12,
            "model_flop": model_flop, "executed_flop": executed_flop,
            "first_step_s": steps["first_seconds"] if record.is_timed else None,
            "build_s": build_seconds if record.is_timed else None,
            "quartiles_s": None if times is None else [times.low / 1000, times.high / 1000],
            "all_s": seconds if record.is_timed else None,
            "weights_gib": None if weights is None else weights / GIB,
            "budget": {p.name: p.num_bytes / GIB for p in run.budget.parts},
            "budget_moment": run.budget.moment, "card_gib": None if run.card is None else run.card / GIB,
            "retries": run.retries, "losses": steps["losses"], "card": steps["card"],
            "spec": run.spec.model_dump(mode="json"),
        }],
    )  # fmt: skip
    if run.given.profile:
        profile(run, model)


def take_steps(run: Run, model: PeftModel) -> dict[str, Any]:
    """Take warm-up and measured steps; every one has as many tokens."""
    optimizer = build_optimizer(model.named_parameters(), run.spec.optim)
    total = run.given.warm_up + run.given.steps
    batches = [batches_of(run, number) for number in range(1, total + 1)]
    seconds, losses = list[float](), list[float]()
    with watched_card(run.record.device) as card:
        for number, step_batches in enumerate(batches, 1):
            start = time.perf_counter()
            losses.append(step(run, model, optimizer, step_batches, number))
            seconds.append(time.perf_counter() - start)
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss of step {number} is {losses[-1]}")
    supervised = [
        sum(int((batch.labels != IGNORED).sum()) for batch in each)
        for each in batches[run.given.warm_up :]
    ]
    architecture, flop = read_architecture(run.config), (0.0, 0.0)
    for number, count in enumerate(supervised, run.given.warm_up + 1):
        lengths = [length for row in documents(run, number) for length in row]
        one = step_flop(architecture, lengths, count, run.budget.recomputed)
        flop = flop[0] + one.model / len(supervised), flop[1] + one.executed / len(supervised)
    return {
        "seconds": seconds[run.given.warm_up :],
        "first_seconds": seconds[0],
        "losses": losses,
        "flop": flop,
        "tokens": sum(batch.tokens.numel() for batch in batches[-1]),
        "supervised": round(sum(supervised) / len(supervised)),
        "card": card.said,
    }


def step(
    run: Run,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    number: int,
) -> float:
    """Take one optimizer step as workers.engine.train does; returns its loss."""
    supervised = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    loss = torch.zeros((), device=run.record.device)
    for batch in batches:
        share = batch_loss(model, batch, supervised)
        share.backward()  # type: ignore[no-untyped-call]
        loss += share.detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    clip_gradients(trained, run.spec.optim.max_grad_norm)
    total = run.given.warm_up + run.given.steps
    set_learning_rate(optimizer, learning_rate_at(run.spec.optim, min(number, total), total))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if run.record.device.type == "cuda":
        torch.cuda.synchronize(run.record.device)
    return float(loss)


def profile(run: Run, model: PeftModel) -> None:
    """Say which kernels two more steps spend their time in."""
    optimizer = build_optimizer(model.named_parameters(), run.spec.optim)
    with torch.profiler.profile() as found:
        for number in range(_PROFILED_STEPS):
            step(run, model, optimizer, batches_of(run, 0), number + 1)
    by = "self_device_time_total" if run.record.is_timed else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)
    run.record.row("profile", **run.settings, steps=_PROFILED_STEPS, more=table.splitlines())
    if run.record.is_timed:
        print(table)


def settle(device: torch.device) -> None:
    """Give cached memory back, and count peaks from now on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def peaks(device: torch.device) -> tuple[float | None, float | None]:
    """Return the most that was allocated and reserved, in GiB."""
    if device.type != "cuda":
        return None, None
    allocated = torch.cuda.max_memory_allocated(device)
    return allocated / GIB, torch.cuda.max_memory_reserved(device) / GIB


if __name__ == "__main__":
    sys.exit(main())
