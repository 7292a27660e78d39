"""A trainer without a model, for faults of processes: real run folder, no torch.

It keeps the contract of the run folder with the engine's own files of Checkpoints, and halts where
a test wants it to. What it learns is a chain of hashes, one link a step: an adapter that left out,
doubled or mixed up a step is another one.

FAULTS names a folder: script.json there says what to do, hold/POINT where to halt. It then makes
at/POINT, and goes on when hold/POINT is gone.
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from studio.disk import RunFolder, write_whole
from studio.domain.section import Section
from workers.engine.checkpoint_files import (
    TENSORS,
    latest_good,
    make_room,
    prune,
    publish,
    put_back,
    rng_name,
)
from workers.fence import Fence, FencedError, fence_of
from workers.process import tie_process

FAULTS = "FAULTS"
SAVE_STEPS = 2
_PATIENCE_SECONDS = 120.0


class Script(Section):
    """What the trainer does.

    Attributes:
        step_seconds: How long a step takes.
        is_deaf: Whether it ignores a wish to stop.
        prints: Bytes that it writes to its log in the first step.
        says: Content of error.json; it ends with the code therein before its first step.
    """

    steps: int = 8
    step_seconds: float = 0.02
    is_deaf: bool = False
    prints: int = 0
    says: dict[str, Any] | None = None


def faults() -> Path:
    """Return the folder of the test."""
    return Path(os.getenv(FAULTS, ""))


def halt(point: str) -> None:
    """Wait here as long as the test wants it."""
    hold = faults() / "hold" / point
    deadline = time.monotonic() + _PATIENCE_SECONDS
    if hold.exists():
        (faults() / "at" / point).touch()
    while hold.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


@dataclass(frozen=True, kw_only=True, slots=True)
class _HaltingFence(Fence):
    """Is asked between the last file of a Checkpoint and the moment it gets its name."""

    def is_lost(self) -> bool:
        """Halt, then look."""
        halt("before the name")
        return super(_HaltingFence, self).is_lost()


class Stub:
    """One try of a run."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._fence = fence_of(folder)
        self._is_asked = False
        self._link = "beginning"

    def run(self, script: Script) -> int:
        """Train, and return the exit code."""
        folder = self._folder
        self._fence.check()
        if script.is_deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._stage("starting")
        halt("starting")
        self._stage("loading the base model")
        halt("loading")
        folder.checkpoints.mkdir(exist_ok=True)
        begun = self._begin()
        if script.says is not None:
            write_whole(folder.error, json.dumps(script.says))
            return int(script.says["code"])
        if not script.is_deaf:
            signal.signal(signal.SIGTERM, self._note)
        self._stage("training")
        sys.stdout.write("x" * script.prints + "\n")
        step = begun
        while step < script.steps and not self._is_asked:
            time.sleep(script.step_seconds)
            step += 1
            self._link = hashlib.sha256(f"{self._link} {step}".encode()).hexdigest()
            self._measure(step, script.steps)
            halt(f"step {step}")
            self._fence.check()
            if step % SAVE_STEPS == 0:
                self._save(step)
        return self._finish(step, script.steps)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self._is_asked = True
        (faults() / "at" / "asked").touch()

    def _begin(self) -> int:
        put_back(self._folder.checkpoints)
        good = latest_good(self._folder.checkpoints)
        step = 0
        if good is not None:
            self._link = (good / TENSORS / "link").read_text()
            step = int(good.name.removeprefix("step-"))
        metrics = self._folder.metrics
        if metrics.exists():
            lines = [
                line for line in metrics.read_text().splitlines(keepends=True) if line[-1:] == "\n"
            ]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_whole(metrics, "".join(kept))
        words = f"Goes on from its Checkpoint of step {step}." if step else "Begins anew."
        self._event("began", step, words)
        return step

    def _save(self, step: int) -> None:
        folder, fence = self._folder, self._fence
        self._stage("saving a checkpoint")
        target = folder.checkpoint(step)
        temporary = target.parent / f".{target.name}.{fence.epoch}.part"
        make_room(temporary, 1000)
        (temporary / TENSORS).mkdir()
        (temporary / TENSORS / "link").write_text(self._link)
        halt("between two files")
        (temporary / rng_name(0)).write_text("")
        halting = _HaltingFence(owner=fence.owner, mark=fence.mark)
        publish(temporary, target, {"ranks": 1, "step": step}, halting)
        prune(folder.checkpoints, 2)
        self._event("saved", step, f"Checkpoint of step {step} saved.")
        self._stage("training")

    def _finish(self, step: int, total: int) -> int:
        if step % SAVE_STEPS:
            self._save(step)
        self._stage("saving the adapter")
        halt("finishing")
        self._fence.check()
        self._folder.adapter.mkdir(exist_ok=True)
        write_whole(self._folder.adapter / "adapter_model.safetensors", self._link)
        state = "FINISHED" if step == total else "STOPPED"
        write_whole(self._folder.result, json.dumps({"state": state, "step": step}))
        halt("finished")
        return 0

    def _stage(self, stage: str) -> None:
        write_whole(self._folder.stage, json.dumps({"stage": stage, "detail": ""}))

    def _measure(self, step: int, total: int) -> None:
        record = {"step": step, "total_steps": total, "values": {"loss": 1.0 / step}}
        with self._folder.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _event(self, kind: str, step: int, text: str) -> None:
        values = {"at": time.time(), "epoch": self._fence.epoch, "kind": kind, "step": step}
        with self._folder.events.open("a") as file:
            file.write(json.dumps({**values, "text": text}) + "\n")


def main() -> int:
    """Train as script.json says, alone on the device."""
    tie_process()
    rank = int(os.getenv("LOCAL_RANK", "0"))
    cards = os.getenv("CUDA_VISIBLE_DEVICES", "cpu").split(",")
    alone = (faults() / f"alone-{cards[rank]}").open("a")
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with (faults() / "overlaps").open("a") as file:
            file.write(f"{cards[rank]} of {os.getenv('STUDIO_RUN')}\n")
    folder = RunFolder(path=Path(sys.argv[1]))
    if rank:
        while not folder.result.exists():
            time.sleep(0.01)
        return 0
    script = Script.model_validate_json((faults() / "script.json").read_text())
    try:
        return Stub(folder).run(script)
    except FencedError as error:
        return error.code


if __name__ == "__main__":
    sys.exit(main())
