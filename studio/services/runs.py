"""Verbs of Runs: submit, stop, look at."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from studio.disk import RunFolder
from studio.dispatch import Bell
from studio.domain.metrics import STEP_SECONDS, Point, thin, time_left_seconds
from studio.domain.preset import find_preset
from studio.domain.proof import Proofs, Recall
from studio.domain.run import RunState
from studio.domain.sample import Sample
from studio.domain.spec import JobSpec, parse_spec, yaml_mapping
from studio.errors import ConflictError, InputError, NotFoundError
from studio.services import mixtures, models
from studio.services.studio import Studio
from studio.store import leases
from studio.store import runs as store
from studio.store.rows import RunRow

MAX_CURVE_POINTS = 1000
MAX_LISTED = 200
LOG_TAIL_BYTES = 64 * 1024


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


def submit(studio: Studio, spec: JobSpec) -> RunRow:
    """Put a Run into the queue.

    Args:
        studio: The installation.
        spec: What to train; `data.dataset` may be a name, a number or a content hash.

    Returns:
        The Run, QUEUED; its spec names all Datasets by content hash.

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
    values = data.pinned(spec).model_dump(mode="json")
    with studio.database.write() as session:
        row = RunRow(
            name=spec.name or f"{dataset.name} on {spec.preset or spec.model.id}",
            preset=spec.preset,
            dataset_id=dataset.id,
            spec=values,
            state=RunState.QUEUED,
            created_at=time.time(),
        )
        session.add(row)
    studio.dispatch.ring(Bell.TRAIN)
    return get(studio, row.id)


def stop(studio: Studio, run_id: int) -> RunRow:
    """Ask a Run to stop; it saves its adapter at the next step boundary.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is over already.
    """
    now = time.time()
    with studio.database.write() as session:
        moved = leases.move(session, RunRow, run_id, RunState.STOPPING, now=now)
        if not moved:
            row = session.get(RunRow, run_id)
            if row is not None and row.state == RunState.QUEUED:
                moved = leases.move(session, RunRow, run_id, RunState.STOPPED, now=now)
    row = get(studio, run_id)
    if not moved and row.state != RunState.STOPPING:
        raise ConflictError(
            f"Run {run_id} is {row.state} already.", "Only a queued or running run can be stopped."
        )
    return row


def resume(studio: Studio, run_id: int) -> RunRow:
    """Put a stopped or failed Run back into the queue; it goes on from its latest Checkpoint.

    One that has no Checkpoint starts from the beginning.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is queued or works, or it is finished.
    """
    with studio.database.write() as session:
        moved = leases.move(session, RunRow, run_id, RunState.QUEUED, now=time.time())
        if moved:
            row = session.get_one(RunRow, run_id, populate_existing=True)
            row.finished_at, row.error, row.result, row.stage = None, None, None, ""
    row = get(studio, run_id)
    if not moved:
        raise ConflictError(
            f"Run {run_id} is {row.state}.", "Only a stopped or failed run can be resumed."
        )
    studio.dispatch.ring(Bell.TRAIN)
    return row


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
        raise NotFoundError(f"There is no run {run_id}.", "`studio runs` lists all runs.")
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
    if row.started_at is not None:
        elapsed = (row.finished_at or time.time()) - row.started_at
    return Progress(
        step=row.step, total_steps=row.total_steps, left_seconds=left, elapsed_seconds=elapsed
    )


def folder(studio: Studio, run_id: int) -> RunFolder:
    """Return the folder of a Run."""
    return studio.home.run(run_id)


def log_tail(studio: Studio, run_id: int) -> str:
    """Return the end of a Run's log without control characters; empty when there is none yet."""
    return read_tail(folder(studio, run_id).log)


def read_tail(path: Path) -> str:
    """Return the last 64 KiB of a text file without control characters."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    return "".join(c for c in text if c == "\n" or c == "\t" or c.isprintable())


def proofs(studio: Studio, run_id: int) -> Proofs:
    """Return the Proofs measured so far."""
    path = folder(studio, run_id).proofs
    if not path.exists():
        return Proofs()
    return Proofs.model_validate_json(path.read_text(encoding="utf-8"))


def recall(studio: Studio, run_id: int) -> Recall | None:
    """Return the answers to the example questions, when they were asked."""
    path = folder(studio, run_id).recall
    if not path.exists():
        return None
    return Recall.model_validate_json(path.read_text(encoding="utf-8"))


def samples(studio: Studio, run_id: int) -> list[Sample]:
    """Return what the model said to the sample prompts so far, in the order of the steps."""
    path = folder(studio, run_id).samples
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [Sample.model_validate_json(line) for line in whole.splitlines()]


def stage_of(path: Path) -> dict[str, Any]:
    """Return what a process says it does now; empty when it has not said anything."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


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
