"""A real worker whose Runs are trained by tests.soak.trainer, with Leases as short as a test wants.

    python -m tests.soak.worker --home DIR

SOAK_LEASE_SECONDS  length of a Lease; how often it is renewed and looked at follows from it
SOAK_UNFENCED       the negative control: nothing that is left of an earlier try is killed, slots
                    are not proved free, and the trainers look at no owner and die with nobody
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from studio.store import leases
from tests.soak.trainer import UNFENCED

LEASE_SECONDS = "SOAK_LEASE_SECONDS"
MODULE = "tests.soak.worker"


def command(run_folder: Path, _num_gpus: int) -> list[str]:
    """Return the command of one Run: one process, whatever cards it has."""
    return [sys.executable, "-m", "tests.soak.trainer", str(run_folder)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker until it is asked to end."""
    environment = os.environ  # noqa: TID251  # what the test has handed over
    leases.LEASE_SECONDS = float(environment.get(LEASE_SECONDS, leases.LEASE_SECONDS))
    # Only now: the other times are made from this one when their modules are imported.
    from workers import __main__ as worker

    if environment.get(UNFENCED):
        _take_fences_away()
    return worker.main(arguments, command=command)


def _take_fences_away() -> None:
    from workers import launcher, slots

    def kill_marked(mark: str) -> list[int]:  # noqa: ARG001
        return []

    def all_marks() -> Iterator[tuple[int, str]]:
        return iter(())

    def prove_free(_: slots.Taken) -> None:
        """Believe it."""

    launcher.kill_marked = kill_marked
    launcher.all_marks = all_marks
    slots.Taken.prove_free = prove_free  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    sys.exit(main())
