"""Bringing NF4 weights back to 16 bits: bytes a second, at the expert stacks of the presets.

    python -m benchmarks.gpu.nf4 [--out FOLDER] [--device cpu --tiny]

bitsandbytes' kernel as workers.engine.quantize calls it, double quantisation included, beside the
same kernel with constants that are in float32 already, and a plain copy on the device. The weights
are quantised expert by expert, as the engine does, and compared with the sixteen numbers of NF4 and
float32 arithmetic at the first, the middle and the last expert.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from torch import nn

from benchmarks.gpu.clock import copy_bandwidth, per_second, timed
from benchmarks.gpu.record import Record, arguments, checked
from workers.engine.quantize import expert_weight, keep_state, nf4_states, quantise_experts
from workers.engine.self_tests import limit

# (experts, out, in)
STACKS = {
    "80b gate_up": (512, 1024, 2048),
    "80b down": (512, 2048, 512),
    "122b gate_up": (256, 2048, 3072),
    "35b gate_up": (256, 1024, 2048),
}
TINY_STACKS = {"tiny": (4, 64, 128)}
# A code, a share of a constant in 8 bits, and a share of that one's in float32.
READ_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def main(argv: Sequence[str] | None = None) -> int:
    """Try and time everything; return 1 when a weight is wrong."""
    record = Record("nf4", checked(arguments(__doc__), argv))
    bandwidth = copy_bandwidth(record.device)
    record.row("copy of 2 GiB", tb_per_s=None if bandwidth is None else bandwidth / 1e12)
    for name, shape in (TINY_STACKS if record.is_tiny else STACKS).items():
        act = partial(measure, record, name, torch.Size(shape), bandwidth)
        record.attempt("dequantised", act, stack=name)
    return record.exit_code()


def measure(record: Record, name: str, shape: torch.Size, bandwidth: float | None) -> None:
    """Quantise a stack, compare what comes back, and time it."""
    module = nn.Module()
    quantising = timed("quantise", partial(quantise, record, module, shape), record.device)
    state = nf4_states(module)["weight"]
    packed: torch.Tensor = module.get_parameter("weight").detach()
    plain = QuantState(  # type: ignore[no-untyped-call]
        absmax=constants_of(state), shape=shape, dtype=state.dtype, blocksize=state.blocksize,
        code=state.code, quant_type="nf4",
    )  # fmt: skip
    values = timed("nested", lambda: expert_weight(module, "weight", record.dtype), record.device)
    values |= timed("plain", lambda: dequantize_4bit(packed, plain), record.device)
    values |= timed("constants", lambda: constants_of(state), record.device)
    moved = shape.numel() * (READ_BYTES + record.dtype.itemsize)
    rate = per_second(moved, values, "nested")
    error = error_of(expert_weight(module, "weight", record.dtype), packed, state)
    record.row(
        "dequantised", stack=name, shape=list(shape), **values, **quantising,
        tb_per_s=None if rate is None else rate / 1e12,
        of_copy=None if rate is None or bandwidth is None else rate / bandwidth,
        error=error, passed=error <= limit(record.dtype),
    )  # fmt: skip


def quantise(record: Record, module: nn.Module, shape: torch.Size) -> None:
    """Put a random stack of experts into a module, in 4 bits, as the engine keeps it."""
    generator = torch.Generator(record.device).manual_seed(0)
    parts = (
        torch.randn(shape[1:], device=record.device, dtype=record.dtype, generator=generator) / 50
        for _ in range(shape[0])
    )
    parameter = quantise_experts(parts, shape)
    module.register_parameter("weight", parameter)
    vars(module).pop("nf4_states", None)
    keep_state(module, "weight", parameter)


def constants_of(state: QuantState) -> torch.Tensor:
    """Return the constant of each block of 64 weights, float32."""
    constants: torch.Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return constants


def error_of(found: torch.Tensor, packed: torch.Tensor, state: QuantState) -> float:
    """Return the largest relative error of three experts against plain arithmetic."""
    experts, size = len(found), math.prod(found.shape[1:])
    constants = constants_of(state).view(experts, -1)
    worst = 0.0
    for number in (0, experts // 2, experts - 1):
        some = packed.view(torch.uint8).view(experts, -1)[number].int()
        # The first of two weights lies in the upper half of a byte.
        codes = torch.stack([some >> 4, some & 15], 1).reshape(-1)
        blocks = state.code[codes].float().view(-1, state.blocksize) * constants[number][:, None]
        expected = blocks.reshape(size)
        here = found[number].float().reshape(size)
        worst = max(worst, float((here - expected).norm() / expected.norm()))
    return worst if math.isfinite(worst) else float("inf")


if __name__ == "__main__":
    sys.exit(main())
