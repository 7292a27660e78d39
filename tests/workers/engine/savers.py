"""A program whose children save tiny Checkpoints until they are killed, each where the last began.

    python tests/workers/engine/savers.py FOLDER TRIALS SEED

Importing takes seconds, so it is done once: every trial is a fork of this process, killed by SIGKILL
at a random instant of its saves. What one has left the next one judges first. The last line of the
output is what they found, as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from studio.disk import RunFolder
from studio.domain.train_spec import TrainSpec
from workers.engine.checkpoint import Progress, load_checkpoint, save_checkpoint
from workers.engine.checkpoint_files import damage_of, latest_good, prune, put_back
from workers.engine.world import World, open_world

LONGEST_SECONDS = 0.12
KEEP = 3


class Tiny:
    """A model whose weights are the number of steps that it has taken."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.model = nn.Linear(8, 4)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(0.0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.progress = Progress(step=0, base_id="tiny/x")

    def step(self) -> None:
        """Take one."""
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.losses.append(float(self.progress.step))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float(self.progress.step))

    def load(self, folder: Path) -> bool:
        """Load a Checkpoint; tell whether all in it is of the step that its name says."""
        self.progress = load_checkpoint(folder, self.model, self.optimizer, self.world)
        step = float(folder.name.removeprefix("step-"))
        numbers = [float(state["step"]) for state in self.optimizer.state.values()]
        return (
            self.progress.step == step
            and self.progress.losses == [float(number) for number in range(1, int(step) + 1)]
            and all(bool((parameter == step).all()) for parameter in self.model.parameters())
            and numbers == [step, step]
        )


def judge(run: RunFolder, world: World) -> dict[str, int]:
    """Return what the last child has left: the step to go on from, and what was cut off."""
    remains = len(list(run.checkpoints.glob(".step-*")))
    put_back(run.checkpoints)
    folders = list(run.checkpoints.glob("step-*"))
    believed = [folder for folder in folders if not damage_of(folder)]
    wrong = sum(not Tiny(world).load(folder) for folder in believed)
    latest = latest_good(run.checkpoints)
    return {
        "step": int(latest.name.removeprefix("step-")) if latest else 0,
        "remains": remains,
        "damaged": len(folders) - len(believed),
        "wrong": wrong,
    }


def save_for_ever(run: RunFolder, world: World, told: int) -> None:
    """Judge, tell it, and save one Checkpoint after the other; each third one of the same step."""
    found = judge(run, world)
    tiny = Tiny(world)
    if found["step"]:
        tiny.load(run.checkpoint(found["step"]))
    os.write(told, json.dumps(found).encode() + b"\n")
    while True:
        tiny.step()
        for _ in range(2 if tiny.progress.step % 3 == 0 else 1):
            save_checkpoint(run, tiny.model, tiny.optimizer, world, tiny.progress)
            prune(run.checkpoints, KEEP)
            os.write(told, b"%d\n" % tiny.progress.step)


def trial(run: RunFolder, world: World, seconds: float) -> tuple[dict[str, int], int]:
    """Kill a child after some time of saving; return what it found and the last step it finished."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        save_for_ever(run, world, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        found = json.loads(told.readline())
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        finished = told.read().split(b"\n")[:-1]
    return found, int(finished[-1]) if finished else int(found["step"])


def main() -> None:
    """Kill many; print what they found."""
    folder, trials, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    run, world, dice = (
        RunFolder(path=folder),
        open_world(TrainSpec(num_gpus=0)),
        random.Random(seed),
    )
    finished, lost, total = 0, 0, {"remains": 0, "damaged": 0, "wrong": 0}
    for _ in range(trials):
        found, now = trial(run, world, dice.uniform(0, LONGEST_SECONDS))
        # What was finished before the kill is there; the one at hand may have come through as well.
        lost += not finished <= found["step"] <= finished + 1
        total = {name: count + found[name] for name, count in total.items()}
        finished = now
    print(json.dumps({"steps": finished, "lost": lost, **total}))  # noqa: T201


if __name__ == "__main__":
    main()
