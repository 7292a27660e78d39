"""Where a run begins: anew, at its own latest Checkpoint, or at one of another run (a fork)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studio.disk import RunFolder
from studio.errors import InputError
from workers.engine.checkpoint import Progress, load_checkpoint, load_weights
from workers.engine.checkpoint_files import damage_of, latest_good, put_back
from workers.engine.optimizer_state import OtherOptimizerError
from workers.engine.report import Reporter
from workers.engine.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """What a run begins with.

    Attributes:
        model: Its parameters that train are overwritten where there is something to go on from.
        optimizer: Of the same parameters, built as the run's own spec says.
        world: The processes of the run.
        report: Is told where the run begins.
        base_id: Id of the base weights.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    world: World
    report: Reporter
    base_id: str


def begin(run: RunFolder, begun: Begun, total_steps: int) -> tuple[Progress, bool]:
    """Bring a run to where it goes on; all ranks call it.

    Its own newest undamaged Checkpoint comes first. Without one a fork begins from its origin:
    either with everything (weights, optimizer, random numbers, losses, step), of which all that a
    spec can say follows the spec of this run, or with the weights alone.

    Args:
        run: The run folder.
        begun: What is brought there.
        total_steps: Steps of this run.

    Returns:
        How far it is, and whether a Checkpoint of its own holds all of that.

    Raises:
        InputError: The origin of a fork cannot be used, or leaves nothing to be done.
        EngineError: A Checkpoint is of another model or another optimizer.
        MachineError: The disk is full or read-only.
    """
    world, report = begun.world, begun.report
    report.stage("looking for a checkpoint")
    world.from_main(lambda: put_back(run.checkpoints))
    own = world.from_main(lambda: latest_good(run.checkpoints, report.passed_over))
    if own is not None:
        report.stage("going on", own.name)
        progress = load_checkpoint(own, begun.model, begun.optimizer, world)
        report.go_on(progress.step)
        text = f"Goes on from its Checkpoint of step {progress.step}."
        report.event("began", progress.step, text)
        return progress, True
    if not world.from_main(run.origin.exists):
        report.go_on(-1)
        report.event("began", 0, "Begins anew.")
        return Progress(step=0, base_id=begun.base_id), False
    return _fork(run.origin, begun, total_steps), False


def _fork(origin: Path, begun: Begun, total_steps: int) -> Progress:
    """Begin from the Checkpoint of another run."""
    world, report = begun.world, begun.report
    values = world.from_main(lambda: _read_origin(origin))
    step, whose = values["step"], f"step {values['step']} of run {values['run']}"
    report.stage("beginning from another run", whose)
    if values["keep"] == "weights":
        load_weights(origin / "checkpoint", begun.model, world)
        report.go_on(-1)
        report.event("began", 0, f"Begins with the weights of {whose}.")
        return Progress(step=0, base_id=begun.base_id)
    if total_steps <= step:
        raise InputError(
            f"This run has {total_steps} steps in all, and {whose}, from which it goes on, is "
            "behind them already: nothing is left to train.",
            "Raise the epochs or the most steps, or fork with the weights alone.",
            "train.epochs",
        )
    text = f"Goes on from {whose}, with its optimizer and random numbers."
    try:
        progress = load_checkpoint(origin / "checkpoint", begun.model, begun.optimizer, world)
    except OtherOptimizerError:
        progress = load_checkpoint(origin / "checkpoint", begun.model, None, world)
        text = (
            f"Goes on from {whose} with a fresh optimizer: that run had another one, whose state "
            "this one cannot use."
        )
    report.go_on(progress.step)  # what was taken over stays; what came after is repeated
    report.event("began", progress.step, text)
    # What the other run evaluated may be other examples, and its best Checkpoint is not here.
    return Progress(step=progress.step, base_id=begun.base_id, losses=progress.losses)


def _read_origin(origin: Path) -> Mapping[str, Any]:
    """Return {"run", "step", "keep"} of a fork whose Checkpoint is whole."""
    again = "Fork the other run once more."
    try:
        values = json.loads((origin / "origin.json").read_text(encoding="utf-8"))
        found = {"run": values["run"], "step": int(values["step"]), "keep": values["keep"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"What this run was forked from cannot be read in {origin}: {error}.", again
        ) from error
    if found["keep"] not in ("everything", "weights"):
        raise InputError(f"A fork cannot keep {found['keep']!r}.", again)
    if damage := damage_of(origin / "checkpoint"):
        raise InputError(
            f"The Checkpoint that this run was forked from is damaged: {damage}.",
            "Fork from another Checkpoint.",
        )
    return found
