"""The Checkpoints of a Run: what there is to go on from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.domain.metrics import EVAL_LOSS
from studio.errors import NotFoundError
from studio.services import runs, shared
from studio.services.studio import Studio
from studio.store import runs as store

# The names are those of workers/engine/checkpoint_files.py.
MANIFEST, STATE, PREFIX = "manifest.json", "state.json", "step-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A Checkpoint that is whole, as far as the sizes of its files tell.

    Attributes:
        step: Steps done.
        saved_at: Seconds since 1970.
        evaluation_loss: In nats per token that is never trained on; None when it was not measured
            at this step.
        is_best: Whether no other one of the Run has a lower evaluation loss.
    """

    step: int
    folder: Path
    size_bytes: int
    saved_at: float
    evaluation_loss: float | None
    is_best: bool


def listing(studio: Studio, run_id: int) -> list[Checkpoint]:
    """Return the good Checkpoints of a Run, newest first; nothing is hashed.

    Raises:
        NotFoundError: There is no such Run.
    """
    runs.get(studio, run_id)
    shared.fetch_checkpoints(studio, run_id)
    folders = studio.home.run(run_id).checkpoints.glob(f"{PREFIX}*")
    sizes = {folder: size for folder in folders if (size := size_of(folder)) is not None}
    if not sizes:
        return []
    with studio.database.read() as session:
        losses = {point.step: point.value for point in store.curve(session, run_id, EVAL_LOSS)}
    steps = {folder: int(folder.name.removeprefix(PREFIX)) for folder in sizes}
    known = {step: losses[step] for step in steps.values() if step in losses}
    best = min(known, key=lambda step: (known[step], step), default=None)
    found = [
        Checkpoint(
            step=step,
            folder=folder,
            size_bytes=sizes[folder][0],
            saved_at=sizes[folder][1],
            evaluation_loss=known.get(step),
            is_best=step == best,
        )
        for folder, step in steps.items()
    ]
    return sorted(found, key=lambda one: -one.step)


def get(studio: Studio, run_id: int, step: int) -> Checkpoint:
    """Return the Checkpoint of a step.

    Raises:
        NotFoundError: There is no such Run, or it has no good Checkpoint of that step.
    """
    found = listing(studio, run_id)
    for one in found:
        if one.step == step:
            return one
    there = ", ".join(str(one.step) for one in found)
    raise NotFoundError(
        f"Run {run_id} has no checkpoint of step {step}.",
        f"It has those of step {there}." if there else "Ask it to save one now, or let it end.",
    )


def size_of(folder: Path) -> tuple[int, float] | None:
    """Return bytes and time of a Checkpoint; None when it is not whole, by the sizes of its files.

    It may be removed while this looks.
    """
    if not folder.name.removeprefix(PREFIX).isdecimal() and folder.name != "checkpoint":
        return None
    try:
        manifest = folder / MANIFEST
        files: dict[str, dict[str, Any]] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        wanted = {name: int(stored["bytes"]) for name, stored in files.items()}
        if STATE not in wanted:
            return None
        if any((folder / name).stat().st_size != size for name, size in wanted.items()):
            return None
        return sum(wanted.values()), manifest.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
