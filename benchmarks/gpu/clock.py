"""Times, peaks of memory, and what the card itself says; on a CPU none of them is a result."""

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# Caches hold 50 MB (H100) or 60 MB (H200): what was just computed must not be read back from there.
_FLUSH_BYTES = 256 * 2**20
_WARM_UPS, _LEAST_ROUNDS, _MOST_ROUNDS = 3, 5, 30
# What the card is asked while something runs, and how often.
_ASKED_EVERY_SECONDS = 0.5
_QUERY = ("clocks.sm", "power.draw", "temperature.gpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Milliseconds of the same thing done several times."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Times":
        """Return median and quartiles."""
        low, _, high = statistics.quantiles(milliseconds, n=4)
        return cls(
            median=statistics.median(milliseconds), low=low, high=high, rounds=len(milliseconds)
        )

    def as_values(self, name: str) -> dict[str, Any]:
        """Return what a row says of it; the quartiles go to the file only."""
        return {
            f"{name}_ms": self.median,
            f"{name}_quartiles_ms": [self.low, self.high],
            f"{name}_rounds": [self.rounds],
        }


def time_of(
    act: Callable[[], object], device: torch.device, *, seconds: float = 0.4
) -> Times | None:
    """Do something until so many seconds have gone, and return its times on the device.

    Args:
        act: What is timed; its result is dropped.
        device: A CPU does it once, and gives no times.
        seconds: Of all rounds together; at least 5 and at most 30 are taken.
    """
    if device.type != "cuda":
        act()
        return None
    for _ in range(_WARM_UPS):
        act()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    events = list[tuple[torch.cuda.Event, torch.cuda.Event]]()
    until = time.monotonic() + seconds
    while len(events) < _LEAST_ROUNDS or (len(events) < _MOST_ROUNDS and time.monotonic() < until):
        flush.fill_(len(events))
        start, end = _event(), _event()
        start.record()
        act()
        end.record()
        # So that the clock on the wall means something.
        end.synchronize()
        events.append((start, end))
    return Times.of([start.elapsed_time(end) for start, end in events])


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def timed(name: str, act: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Time something as values of a row; on a CPU it is done once and they say nothing."""
    times = time_of(act, device)
    return {f"{name}_ms": None} if times is None else times.as_values(name)


def per_second(amount: float, values: dict[str, Any], name: str) -> float | None:
    """Return how much of something a second was done, by the time called `name` in a row."""
    milliseconds = values.get(f"{name}_ms")
    return None if milliseconds is None else amount / milliseconds * 1000


def peak_of(act: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes that something takes at its peak beyond what was there before."""
    if device.type != "cuda":
        act()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    act()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def poison(num_bytes: int, device: torch.device) -> None:
    """Leave NaNs where the next results will lie: what a kernel does not write then shows."""
    torch.full((num_bytes // 4,), torch.nan, device=device)


def copy_bandwidth(device: torch.device) -> float | None:
    """Return bytes a second that a large copy on the device reads and writes together."""
    if device.type != "cuda":
        return None
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_of(lambda: target.copy_(source), device, seconds=0.3)
    return None if times is None else 2 * source.numel() / times.median * 1000


def matmul_rate(device: torch.device, size: int = 8192) -> float | None:
    """Return FLOP a second of a large product in bfloat16 of random numbers: the real ceiling."""
    if device.type != "cuda":
        return None
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = time_of(lambda: a @ b, device, seconds=0.3)
    return None if times is None else 2 * size**3 / times.median * 1000


@dataclass(kw_only=True, slots=True)
class CardLog:
    """What the card said while something ran; empty where nobody answers."""

    said: dict[str, dict[str, float]] = field(default_factory=dict)


@contextmanager
def watched_card(device: torch.device) -> Iterator[CardLog]:
    """Ask nvidia-smi for clock, power and temperature until the block ends."""
    log = CardLog()
    if device.type != "cuda":
        yield log
        return
    over, rows = threading.Event(), list[list[float]]()

    def ask() -> None:
        # A process each time: one that loops keeps its last answers in a buffer when it is ended.
        while not over.wait(_ASKED_EVERY_SECONDS):
            row = _ask()
            if row is None:
                return
            rows.append(row)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        yield log
    finally:
        over.set()
        asking.join(timeout=10)
        for name, column in zip(_QUERY, zip(*rows, strict=True), strict=False):
            log.said[name] = {"median": statistics.median(column), "max": max(column)}


def _ask() -> list[float] | None:
    """Return what the card says now; None where nobody answers in numbers."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_QUERY)}"]
    command.append("--format=csv,noheader,nounits")
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return [float(part) for part in said.stdout.split(",")]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
