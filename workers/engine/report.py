"""What rank 0 tells the outside: stage, metrics, events, proofs, and how the run ended."""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Literal

import torch

from studio.disk import RunFolder, write_whole
from studio.domain.metrics import StepRecord
from studio.domain.proof import Proof, Proofs
from studio.domain.sample import Sample
from studio.errors import disk_errors
from workers.fence import fence_of

Event = Literal["began", "saved", "evaluated", "passed over"]
PACKAGES = ("delta-studio", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


class Reporter:
    """Writes the files of a run folder that other processes read, as long as it is ours.

    Once another worker has taken the run over nothing is written, silently: all ranks end
    together, at their next vote.

    Args:
        run: The run folder.
        speaks: False on all ranks but the first: they write nothing.
    """

    def __init__(self, run: RunFolder, *, speaks: bool = True) -> None:
        self._run, self._is_main = run, speaks
        self._fence = fence_of(run)
        self._start = time.monotonic()

    @property
    def _speaks(self) -> bool:
        return self._is_main and not self._fence.is_lost()

    def begin(self) -> None:
        """Remove how an earlier attempt at the same run ended, and what it had proved."""
        if not self._speaks:
            return
        for path in (self._run.result, self._run.error, self._run.proofs):
            path.unlink(missing_ok=True)

    def go_on(self, step: int) -> None:
        """Drop what an earlier attempt measured after `step`: those steps are taken again.

        Raises:
            MachineError: The disk is full or read-only.
        """
        if not self._speaks:
            return
        for path in (self._run.metrics, self._run.samples):
            if not path.exists():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            lines = text.splitlines(keepends=True)
            kept = "".join(line for line in lines if _is_until(line, step))
            # A new file makes whoever follows it begin again.
            if kept != text:
                write_whole(path, kept)

    def stage(self, stage: str, detail: str = "") -> None:
        """Say what the engine does now."""
        if self._speaks:
            write_whole(self._run.stage, json.dumps({"stage": stage, "detail": detail}))

    def step(self, step: int, total_steps: int, values: Mapping[str, float]) -> None:
        """Append one step to metrics.jsonl, as one write, so that readers see whole lines.

        Raises:
            MachineError: The disk is full or read-only.
        """
        if not self._speaks:
            return
        record = StepRecord(step=step, total_steps=total_steps, values=dict(values))
        with disk_errors("writing metrics"), self._run.metrics.open("a", encoding="utf-8") as file:
            file.write(record.model_dump_json() + "\n")

    def samples(self, samples: Sequence[Sample]) -> None:
        """Append sample replies to samples.jsonl, as one write.

        Raises:
            MachineError: The disk is full or read-only.
        """
        if not self._speaks:
            return
        text = "".join(sample.model_dump_json() + "\n" for sample in samples)
        with disk_errors("writing samples"), self._run.samples.open("a", encoding="utf-8") as file:
            file.write(text)

    def event(self, kind: Event, step: int | None, text: str) -> None:
        """Append what happened to events.jsonl, as one write.

        Args:
            kind: As in `studio.disk`.
            step: Steps done.
            text: One sentence for a person.

        Raises:
            MachineError: The disk is full or read-only.
        """
        if not self._speaks:
            return
        epoch = self._fence.epoch
        values = {"at": time.time(), "epoch": epoch, "kind": kind, "step": step, "text": text}
        with disk_errors("writing events"), self._run.events.open("ab+") as file:
            # An attempt that was killed while it wrote has left half a line.
            if file.tell() and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(values).encode() + b"\n")

    def passed_over(self, step: int, damage: str) -> None:
        """Append that a damaged Checkpoint was not believed."""
        text = f"The Checkpoint of step {step} was passed over: {damage}."
        self.event("passed over", step, text)

    def proofs(self, proofs: Sequence[Proof]) -> None:
        """Write all Proofs measured so far."""
        if self._speaks:
            text = Proofs(proofs=tuple(proofs)).model_dump_json(indent=2)
            write_whole(self._run.proofs, text)

    def result(
        self,
        state: Literal["FINISHED", "STOPPED"],
        *,
        step: int,
        total_steps: int,
        kept_step: int,
        trainable_parameters: int,
        method: str,
    ) -> None:
        """Write how the run ended: the last act of a run that ends well."""
        if not self._speaks:
            return
        values = {
            "state": state,
            "step": step,
            "total_steps": total_steps,
            "kept_step": kept_step,
            "seconds": time.monotonic() - self._start,
            "peak_memory_bytes": peak_memory_bytes(),
            "trainable_parameters": trainable_parameters,
            "method": method,
            "versions": {"python": python_version(), **{name: version(name) for name in PACKAGES}},
        }
        write_whole(self._run.result, json.dumps(values, indent=2))


def _is_until(line: str, step: int) -> bool:
    # The last line may be half: the process was killed while it wrote it. After a loss of power
    # there may be anything.
    try:
        return line.endswith("}\n") and int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


def peak_memory_bytes() -> int:
    """Return the most memory used so far: of the card on CUDA, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        # Not getrusage: its maximum survives exec, so it may be the parent's.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
