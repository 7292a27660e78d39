"""What the trainers of a soak test have really done, written down outside of the studio's files.

Every trainer appends one line for each thing that it does, in one write, with the time since the
machine was started. Two trainers of one Run, or on one slot, at the same time: these lines show it,
whatever the studio itself believes.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

START, STEP, END, STOPPED, FENCED = "start", "step", "end", "stopped", "fenced"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One thing that a trainer did.

    Attributes:
        slot: The card that it was told to use.
        at: Nanoseconds since the machine was started.
        kind: START, once it may write; STEP; END, once its result says FINISHED; STOPPED; FENCED.
    """

    run: int
    epoch: int
    pid: int
    slot: str
    step: int
    at: int
    kind: str


@dataclass(kw_only=True, slots=True)
class Life:
    """One trainer, from the first to the last thing that it did."""

    run: int
    epoch: int
    slot: str
    lines: list[Line] = field(default_factory=list)

    @property
    def begin(self) -> int:
        """Nanoseconds since the machine was started."""
        return self.lines[0].at

    @property
    def end(self) -> int:
        """Nanoseconds since the machine was started."""
        return self.lines[-1].at


class Book:
    """The pen of one trainer.

    Args:
        path: The audit file, of all trainers.
        mark: STUDIO_RUN of this trainer.
        slot: The card that it was told to use.
    """

    def __init__(self, path: Path, mark: str, slot: str) -> None:
        _, run, epoch, _ = mark.split(":", 3)
        self._start = f"{run} {epoch} {os.getpid()} {slot}"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, kind: str, step: int) -> None:
        """Append one line, whole."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        os.write(self._file, f"{self._start} {step} {now} {kind}\n".encode())


def read(path: Path) -> list[Line]:
    """Return all lines, in the order in which they were written."""
    found = []
    for text in path.read_text(encoding="ascii").splitlines():
        run, epoch, pid, slot, step, at, kind = text.split()
        found.append(
            Line(
                run=int(run),
                epoch=int(epoch),
                pid=int(pid),
                slot=slot,
                step=int(step),
                at=int(at),
                kind=kind,
            )
        )
    return found


def lives(lines: Iterable[Line]) -> list[Life]:
    """Return the trainers that were allowed to write, in the order of their beginning."""
    found: dict[tuple[int, int, int], Life] = {}
    for line in lines:
        if line.kind == FENCED and (line.run, line.epoch, line.pid) not in found:
            continue  # it saw at its start that the run is not its own, and did nothing
        life = found.setdefault(
            (line.run, line.epoch, line.pid), Life(run=line.run, epoch=line.epoch, slot=line.slot)
        )
        life.lines.append(line)
    return sorted(found.values(), key=lambda life: life.begin)


def overlaps(trainers: Iterable[Life], by: Callable[[Life], object]) -> Iterator[tuple[Life, Life]]:
    """Yield trainers that were alive together though they share a Run or a slot."""
    groups: dict[object, list[Life]] = defaultdict(list)
    for life in trainers:
        groups[by(life)].append(life)
    for group in groups.values():
        ordered = sorted(group, key=lambda life: life.begin)
        for one, two in combinations(ordered, 2):
            if two.begin < one.end:
                yield one, two


def finished(lines: Iterable[Line]) -> dict[int, int]:
    """Return how often each Run has said that it finished."""
    counts: dict[int, int] = defaultdict(int)
    for line in lines:
        if line.kind == END:
            counts[line.run] += 1
    return counts


def begun_after(trainers: Iterable[Life], run: int, epoch: int) -> int | None:
    """Return when the first trainer of a later Lease of a Run began; None when none did."""
    later = [life.begin for life in trainers if life.run == run and life.epoch > epoch]
    return min(later, default=None)
