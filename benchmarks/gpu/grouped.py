"""Matrix products in groups of rows, at the experts of the 80B and the 122B.

    python -m benchmarks.gpu.grouped [--out FOLDER] [--device cpu --tiny]

What workers.engine.experts asks of torch: rows times transposed weights (forward), rows times the
same weights as they lie (gradient of the input), and products over the rows of each group (gradients
of A and B), at 40 to 640 rows an expert. Rows are spread as tokens choose experts: at random, and
once skewed (Zipf, s = 0.7). Every product is compared with float32 at the largest, the smallest and
the last group, in memory that held NaNs before.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from benchmarks.gpu.clock import matmul_rate, per_second, poison, timed
from benchmarks.gpu.record import Record, arguments, checked
from workers.engine.self_tests import limit

ROWS = (40, 80, 160, 320, 640)
RANKS = (8, 16)
SKEW = 0.7
# G groups (experts), S rows of all of them, M features in, N features out, R rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One projection of all experts: (G, N, M)."""

    models: str
    name: str
    groups: int
    features_out: int
    features_in: int


SHAPES = (
    Shape(models="80b", name="gate_up", groups=512, features_out=1024, features_in=2048),
    Shape(models="80b", name="down", groups=512, features_out=2048, features_in=512),
    Shape(models="122b", name="gate_up", groups=256, features_out=2048, features_in=3072),
    Shape(models="122b", name="down", groups=256, features_out=3072, features_in=1024),
)
TINY_SHAPES = (Shape(models="tiny", name="gate_up", groups=6, features_out=64, features_in=32),)


def main(argv: Sequence[str] | None = None) -> int:
    """Try and time everything; return 1 when a product is wrong."""
    record = Record("grouped", checked(arguments(__doc__), argv))
    rate = matmul_rate(record.device)
    record.row("one product, 8192 x 8192 x 8192", tflops=None if rate is None else rate / 1e12)
    for shape in TINY_SHAPES if record.is_tiny else SHAPES:
        for rows in (3,) if record.is_tiny else ROWS:
            _attempt(record, shape, rows, is_skewed=False)
        _attempt(record, shape, 3 if record.is_tiny else ROWS[2], is_skewed=True)
    return record.exit_code()


def _attempt(record: Record, shape: Shape, rows: int, *, is_skewed: bool) -> None:
    act = partial(measure, record, shape, rows, is_skewed=is_skewed)
    record.attempt("products", act, shape=shape, rows=rows, skewed=is_skewed)


def sizes_of(groups: int, num_rows: int, *, is_skewed: bool) -> torch.Tensor:
    """Return how many rows each group has, (G,), as tokens that choose at random make it.

    One group stays empty, as happens to experts.
    """
    generator = torch.Generator().manual_seed(groups + num_rows)
    shares = torch.ones(groups)
    if is_skewed:
        places = torch.randperm(groups, generator=generator) + 1
        shares = places.float() ** -SKEW
    shares[1] = 0
    chosen = torch.multinomial(shares, num_rows, replacement=True, generator=generator)
    return torch.bincount(chosen, minlength=groups)


def measure(record: Record, shape: Shape, rows: int, *, is_skewed: bool) -> None:
    """Compare and time all products of one projection."""
    sizes = sizes_of(shape.groups, rows * shape.groups, is_skewed=is_skewed)
    total = int(sizes.sum())
    ends = sizes.cumsum(0).to(record.device, torch.int32)
    generator = torch.Generator(record.device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        drawn = torch.randn(size, device=record.device, dtype=record.dtype, generator=generator)
        return drawn.div_(size[-1] ** 0.5)

    weight = normal(shape.groups, shape.features_out, shape.features_in)
    x, dy = normal(total, shape.features_in), normal(total, shape.features_out)
    products: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor, torch.Tensor]] = {
        "forward": (lambda: functional.grouped_mm(x, weight.mT, offs=ends), x, weight.mT),
        "dX": (lambda: functional.grouped_mm(dy, weight, offs=ends), dy, weight),
    }
    for rank in RANKS:
        z = normal(total, rank)
        products[f"dA, rank {rank}"] = (partial(_ragged, z, x, ends), z.mT, x)
        products[f"dB, rank {rank}"] = (partial(_ragged, z, dy, ends), z.mT, dy)
        a = normal(shape.groups, rank, shape.features_in)
        products[f"x A, rank {rank}"] = (
            partial(functional.grouped_mm, x, a.mT, offs=ends), x, a.mT,
        )  # fmt: skip
    for name, (act, left, right) in products.items():
        error = error_of(act, left, right, sizes)
        times = timed("time", act, record.device)
        flop = 2 * total * left.shape[-1] * right.shape[-1]
        if name.startswith("d") and name != "dX":
            flop = 2 * total * left.shape[0] * right.shape[-1]
        rate = per_second(flop, times, "time")
        record.row(
            "products", models=shape.models, projection=shape.name, product=name, rows=rows,
            skewed=is_skewed, **times, tflops=None if rate is None else rate / 1e12,
            error=error, passed=error <= limit(record.dtype),
        )  # fmt: skip


def _ragged(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return functional.grouped_mm(left.mT, right, offs=ends)


def error_of(
    act: Callable[[], torch.Tensor],
    left: torch.Tensor,
    right: torch.Tensor,
    sizes: torch.Tensor,
) -> float:
    """Return the largest relative error over some groups; NaN anywhere is infinite.

    Args:
        act: Gives rows (S, N) where `right` is (G, M, N), else products (G, R, N).
        left: (S, M), or (R, S).
        right: (G, M, N), or (S, N).
        sizes: Rows of each group, on the CPU.
    """
    num_bytes = 2 * left.numel() * left.element_size()
    poison(num_bytes, left.device)
    found = act()
    if not bool(found.isfinite().all()):
        return float("inf")
    ends, worst = sizes.cumsum(0), 0.0
    for group in {int(sizes.argmax()), int(sizes.argmin()), len(sizes) - 1, 0}:
        part = slice(int(ends[group] - sizes[group]), int(ends[group]))
        if right.ndim == 3:
            expected, here = left[part].float() @ right[group].float(), found[part]
        else:
            expected, here = left[:, part].float() @ right[part].float(), found[group]
        size = float(expected.norm())
        # An empty group gives no rows, or a product that is all zeros.
        difference = float((here.float() - expected).norm())
        worst = max(worst, difference / size if size else difference)
    return worst


if __name__ == "__main__":
    sys.exit(main())
