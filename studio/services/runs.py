"""Verbs of Runs: submit, stop, pause, resume, look at."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from studio.disk import RunFolder
from studio.dispatch import Bell
from studio.domain.metrics import STEP_SECONDS, Point, thin, time_left_seconds
from studio.domain.preset import find_preset
from studio.domain.run import RunState, Wish
from studio.domain.spec import JobSpec, parse_spec, yaml_mapping
from studio.errors import ConflictError, InputError
from studio.services import budgets, mixtures, models, queue, shared
from studio.services.queue import Order
from studio.services.studio import Studio
from studio.store import events, leases
from studio.store import runs as store
from studio.store.rows import EventRow, RunRow

MAX_CURVE_POINTS = 1000
MAX_LISTED = 200
NOW = Order()


def spec_from_preset(studio: Studio, name: str, changes: Mapping[str, Any]) -> JobSpec:
    """Return the JobSpec of a Preset with `changes` laid over it.

    Raises:
        NotFoundError: There is no such Preset.
        InputError: A field is wrong.
    """
    return find_preset(studio.presets, name).job_spec(changes)


def complete_spec(studio: Studio, text: str) -> JobSpec:
    """Parse a spec from YAML; fields that it leaves out come from its preset, if it names one.

    Raises:
        InputError: The text is not YAML or a field is wrong.
        NotFoundError: There is no such Preset.
    """
    values = yaml_mapping(text, "The spec")
    name = values.get("preset")
    return spec_from_preset(studio, str(name), values) if name else parse_spec(values)


def spec_from_file(studio: Studio, path: Path) -> JobSpec:
    """Read a spec from a YAML file; what it leaves out comes from its preset.

    Raises:
        InputError: The file cannot be read, is not YAML, or a field is wrong.
        NotFoundError: There is no such Preset.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.", "Give the path of a YAML file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The spec {path} cannot be read: {error}.", "Give the path of a YAML file."
        ) from error
    return complete_spec(studio, text)


def submit(studio: Studio, spec: JobSpec, order: Order = NOW) -> RunRow:
    """Put a Run into the queue.

    Args:
        studio: The installation.
        spec: What to train; `data.dataset` may be a name, a number or a content hash.
        order: How it waits there.

    Returns:
        The Run, QUEUED; its spec names all Datasets by content hash.

    Raises:
        NotFoundError: There is no such Preset or Dataset, or no Run that it shall wait for.
        InputError: A target group matches nothing, the model cannot be trained, or a Dataset is of
            a kind that cannot be trained on; or the order is wrong.
        ConflictError: The queue is full.
    """
    row = new_row(studio, spec)
    with studio.database.write() as session:
        queue.enter(session, row, order)
        events.add(session, RunRow, row.id, kind="queued", text="You launched it.")
    studio.dispatch.ring(Bell.TRAIN)
    return get(studio, row.id)


def new_row(studio: Studio, spec: JobSpec) -> RunRow:
    """Check a spec and return its Run, which is not stored yet.

    Raises:
        NotFoundError: There is no such Preset or Dataset.
        InputError: A target group matches nothing, the model cannot be trained, or a Dataset is of
            a kind that cannot be trained on.
    """
    if spec.preset:
        find_preset(studio.presets, spec.preset)
    data = mixtures.for_training(studio, spec)
    dataset = data.parts[0].row
    models.check_targets(studio, spec)
    pinned = data.pinned(spec)
    shared.offer_datasets(studio, pinned)
    return RunRow(
        name=spec.name or f"{dataset.name} on {spec.preset or spec.model.id}",
        preset=spec.preset,
        dataset_id=dataset.id,
        spec=pinned.model_dump(mode="json"),
        state=RunState.QUEUED,
        created_at=time.time(),
        num_gpus=spec.train.num_gpus,
        needs_gib=budgets.least_gib(studio, spec),
    )


def stop(studio: Studio, run_id: int) -> RunRow:
    """Ask a Run to stop; it saves its adapter at the next step boundary.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is over already.
    """
    with studio.database.write() as session:
        row = session.get(RunRow, run_id)
        was = "" if row is None else row.state
        to = RunState.STOPPED if was == RunState.QUEUED else RunState.STOPPING
        moved = leases.move(session, RunRow, run_id, to)
        if row is not None and row.state == RunState.STOPPING:
            row.wish = Wish.STOP  # also instead of a pause
        if moved:
            events.add(session, RunRow, run_id, kind="stop asked", text="You asked it to stop.")
    row = get(studio, run_id)
    if not moved and row.state != RunState.STOPPING:
        raise ConflictError(
            f"Run {run_id} is {row.state} already.", "Only a queued or running run can be stopped."
        )
    return row


def pause(studio: Studio, run_id: int) -> RunRow:
    """Keep a queued Run from starting, or let one that works save itself and wait in the queue.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is paused already, is asked to stop, or is over.
    """
    if RunState(get(studio, run_id).state) is RunState.QUEUED:
        return queue.hold(studio, run_id)
    with studio.database.write() as session:
        moved = leases.move(session, RunRow, run_id, RunState.STOPPING)
        if moved:
            row = session.get_one(RunRow, run_id, populate_existing=True)
            row.wish = Wish.PAUSE
            events.add(session, RunRow, run_id, kind="pause asked", text="You asked it to pause.")
    row = get(studio, run_id)
    if not moved and row.wish != Wish.PAUSE:
        raise ConflictError(
            f"Run {run_id} is {row.state}.", "Only a queued or running run can be paused."
        )
    return row


def resume(studio: Studio, run_id: int) -> RunRow:
    """Put a stopped or failed Run back into the queue, or let a paused one go on.

    It goes on from its latest Checkpoint; one that has none starts from the beginning.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is queued or works, it is finished, or the queue is full.
    """
    found = get(studio, run_id)
    if RunState(found.state) is RunState.QUEUED and found.is_held:
        return queue.release(studio, run_id)
    with studio.database.write() as session:
        moved = leases.move(session, RunRow, run_id, RunState.QUEUED)
        if moved:
            row = session.get_one(RunRow, run_id, populate_existing=True)
            row.finished_at, row.error, row.result, row.stage = None, None, None, ""
            row.crashes, row.losses, row.furthest, row.is_held = 0, 0, 0, False
            queue.reenter(session, row)
            events.add(session, RunRow, run_id, kind="resumed", text="You resumed it.")
    row = get(studio, run_id)
    if not moved:
        raise ConflictError(
            f"Run {run_id} is {row.state}.", "Only a stopped, failed or paused run can be resumed."
        )
    studio.dispatch.ring(Bell.TRAIN)
    return row


def save_now(studio: Studio, run_id: int) -> RunRow:
    """Ask a running Run for a Checkpoint at its next step boundary.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It does not run.
    """
    with studio.database.write() as session:
        row = _running(session, run_id, "saved")
        row.saves_asked += 1
        events.add(session, RunRow, run_id, kind="save asked", text="You asked for a checkpoint.")
    return row


def evaluate_now(studio: Studio, run_id: int) -> RunRow:
    """Ask a running Run for an evaluation at its next step boundary.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It does not run, or has nothing to evaluate on.
    """
    with studio.database.write() as session:
        row = _running(session, run_id, "evaluated")
        if not has_evaluation(row):
            raise ConflictError(
                f"Run {run_id} has nothing to evaluate on.",
                "Fork it with an evaluation dataset, an evaluation share or sample prompts.",
            )
        row.evaluations_asked += 1
        text = "You asked for an evaluation."
        events.add(session, RunRow, run_id, kind="evaluation asked", text=text)
    return row


def state_of(row: RunRow) -> str:
    """Return the state of a Run in a word; one that is held in the queue is PAUSED."""
    if row.state == RunState.STOPPING and row.wish == Wish.PAUSE:
        return "PAUSING"
    return "PAUSED" if row.state == RunState.QUEUED and row.is_held else row.state


def has_evaluation(row: RunRow) -> bool:
    """Tell whether a Run measures anything when it evaluates."""
    data, evaluation = row.spec.get("data", {}), row.spec.get("eval", {})
    given = data.get("eval_dataset"), data.get("eval_share"), evaluation.get("prompts")
    return any(given)


def _running(session: Session, run_id: int, done: str) -> RunRow:
    row = session.get(RunRow, run_id)
    if row is None:
        raise queue.no_run(run_id)
    if row.state != RunState.RUNNING:
        raise ConflictError(
            f"Run {run_id} is {state_of(row)}.", f"Only a running run can be {done} now."
        )
    return row


def history(studio: Studio, run_id: int) -> Sequence[EventRow]:
    """Return what happened to a Run, oldest first.

    Raises:
        NotFoundError: There is no such Run.
    """
    get(studio, run_id)
    with studio.database.read() as session:
        return events.of(session, RunRow, run_id)


def listing(studio: Studio) -> Sequence[RunRow]:
    """Return the newest Runs, newest first."""
    with studio.database.read() as session:
        return store.listing(session, MAX_LISTED)


def get(studio: Studio, run_id: int) -> RunRow:
    """Return a Run.

    Raises:
        NotFoundError: There is no such Run.
    """
    with studio.database.read() as session:
        row = session.get(RunRow, run_id)
    if row is None:
        raise queue.no_run(run_id)
    return row


def curves(studio: Studio, run_id: int, names: Sequence[str]) -> dict[str, list[Point]]:
    """Return the Curves of a Run, each thinned to at most 1000 Points."""
    with studio.database.read() as session:
        return {name: thin(store.curve(session, run_id, name), MAX_CURVE_POINTS) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a Run is.

    Attributes:
        left_seconds: Low and high estimate of the time left; None when it cannot be told.
    """

    step: int
    total_steps: int | None
    left_seconds: tuple[float, float] | None
    elapsed_seconds: float | None

    @property
    def fraction(self) -> float | None:
        """Share of the steps done, 0 to 1; None before the first step."""
        return self.step / self.total_steps if self.total_steps else None


def progress(studio: Studio, row: RunRow) -> Progress:
    """Return how far a Run is, and the time left from its latest steps."""
    left = None
    if RunState(row.state) is RunState.RUNNING and row.total_steps:
        with studio.database.read() as session:
            latest = store.latest_values(session, row.id, STEP_SECONDS, 20)
        left = time_left_seconds(latest, row.step, row.total_steps)
    elapsed = None
    if row.started_at is not None and row.state != RunState.QUEUED:
        elapsed = (row.finished_at or time.time()) - row.started_at
    return Progress(
        step=row.step, total_steps=row.total_steps, left_seconds=left, elapsed_seconds=elapsed
    )


def folder(studio: Studio, run_id: int) -> RunFolder:
    """Return the folder of a Run."""
    return studio.home.run(run_id)


def spec_of(row: RunRow) -> JobSpec:
    """Return the JobSpec of a Run.

    Raises:
        ConflictError: It was written by another version of the studio.
    """
    try:
        return JobSpec.model_validate(row.spec)
    except ValidationError as error:
        raise ConflictError(
            f"The spec of run {row.id} is of another version.", "Launch it anew from its preset."
        ) from error
