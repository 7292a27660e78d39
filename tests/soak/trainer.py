"""A trainer without a model: `python -m tests.soak.trainer RUN_FOLDER`.

It keeps the contract of a run folder (studio.disk) as the engine does: dies with its worker, holds
its slots, looks at owner.txt before whatever counts, goes on from its latest Checkpoint, and saves
on SIGTERM. Instead of a model it has a number of steps; instead of torchrun one process. What it
really does stands in the audit file.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from studio.disk import RunFolder, write_whole
from studio.domain.outcome import ExitCode
from tests.soak.audit import END, FENCED, START, STEP, STOPPED, Book
from workers.fence import MARK, Fence, FencedError, fence_of
from workers.process import tie_process

# What the worker of the soak test hands over; see tests.soak.worker.
AUDIT, STEP_SECONDS, UNFENCED = "SOAK_AUDIT", "SOAK_STEP_SECONDS", "SOAK_UNFENCED"


class _Unfenced(Fence):
    """What the negative control has in the place of a fence."""

    def is_lost(self) -> bool:
        """Believe to be the owner."""
        return False


class Trainer:
    """One try of one Run.

    Args:
        folder: The run folder.
        fence: Says whether this process may still write there.
        book: The audit file.
        step_seconds: How long a step takes.
    """

    def __init__(self, folder: RunFolder, fence: Fence, book: Book, step_seconds: float) -> None:
        self._folder, self._fence, self._book = folder, fence, book
        self._step_seconds = step_seconds
        spec = json.loads(folder.spec.read_text(encoding="utf-8"))["train"]
        self._total: int = spec["max_steps"]
        self._save_steps: int = spec["save_steps"]
        self._checkpoint = folder.path / "checkpoint.json"
        self._is_asked_to_stop = False
        signal.signal(signal.SIGTERM, self._stop)

    def train(self) -> None:
        """Take all steps that are left, or those until somebody asks to stop.

        Raises:
            FencedError: Another worker has taken the Run over.
        """
        step = self._begin()
        due = time.monotonic()
        while step < self._total and not self._is_asked_to_stop:
            due += self._step_seconds
            time.sleep(max(0.0, due - time.monotonic()))
            step += 1
            self._fence.check()
            self._book.write(STEP, step)
            self._measure(step)
            if step % self._save_steps == 0:
                self._save(step)
        self._save(step)
        is_over = step == self._total
        values = {"state": "FINISHED" if is_over else "STOPPED", "step": step}
        self._fence.check()
        write_whole(self._folder.result, json.dumps(values))
        self._book.write(END if is_over else STOPPED, step)

    def _begin(self) -> int:
        """Go on where the latest Checkpoint is, as the engine does."""
        self._fence.check()
        self._book.write(START, 0)
        self._folder.result.unlink(missing_ok=True)
        step = 0
        if self._checkpoint.exists():
            step = int(json.loads(self._checkpoint.read_text(encoding="utf-8"))["step"])
        self._forget_after(step)
        self._tell("began", step, f"Goes on from step {step}.")
        write_whole(self._folder.stage, json.dumps({"stage": "training", "detail": ""}))
        return step

    def _forget_after(self, step: int) -> None:
        metrics = self._folder.metrics
        if not metrics.exists():
            return
        text = metrics.read_text(encoding="utf-8")
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]
        kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
        if kept != text:
            self._fence.check()
            write_whole(metrics, kept)

    def _measure(self, step: int) -> None:
        values = {
            "loss": 1.0 / step + self._fence.epoch,
            "learning_rate": 1e-4 * (1 - step / self._total),
            "grad_norm": 1.0 + step % 7,
            "written_at": since_start(),
        }
        self._append(
            self._folder.metrics, {"step": step, "total_steps": self._total, "values": values}
        )

    def _save(self, step: int) -> None:
        self._fence.check()
        write_whole(self._checkpoint, json.dumps({"step": step}))
        self._tell("saved", step, f"Checkpoint of step {step} saved.")

    def _tell(self, kind: str, step: int, text: str) -> None:
        values = {"at": time.time(), "epoch": self._fence.epoch, "kind": kind}
        self._append(self._folder.events, {**values, "step": step, "text": text})

    def _append(self, path: Path, values: dict[str, Any]) -> None:
        with path.open("ab+") as file:
            # A try that was killed while it wrote has left half a line.
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(values).encode() + b"\n")

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._is_asked_to_stop = True


def since_start() -> float:
    """Return the seconds since the machine was started: the same clock in all processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main() -> int:
    """Train.

    Returns:
        The exit code.
    """
    environment = os.environ  # noqa: TID251  # what the worker has handed over
    folder = RunFolder(path=Path(sys.argv[1]).resolve())
    slot = environment.get("CUDA_VISIBLE_DEVICES", "cpu")
    book = Book(Path(environment[AUDIT]), environment[MARK], slot)
    fence = fence_of(folder)
    if environment.get(UNFENCED):
        fence = _Unfenced(owner=fence.owner, mark=fence.mark)
    else:
        tie_process()
    try:
        Trainer(folder, fence, book, float(environment[STEP_SECONDS])).train()
    except FencedError:
        book.write(FENCED, 0)
        return ExitCode.FENCED
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
