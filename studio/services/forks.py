"""Verbs that make a Run from another one: fork from a Checkpoint, clone, compare, lineage."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from studio.disk import RunFolder, write_whole
from studio.dispatch import Bell
from studio.domain.fork import KEEP_WORDS, Keep, check_same, check_steps
from studio.domain.metrics import Point, StepRecord
from studio.domain.preset import merge_values
from studio.domain.sample import Sample
from studio.domain.section import Section
from studio.domain.spec import JobSpec, parse_spec
from studio.domain.spec_diff import Change, diff
from studio.errors import ConflictError, NotFoundError, disk_errors
from studio.services import checkpoints, datasets, queue, runs, shared
from studio.services.checkpoints import Checkpoint
from studio.services.queue import Order
from studio.services.studio import Studio
from studio.store import events, lineage
from studio.store import runs as store
from studio.store.rows import RunRow

CHECKPOINT, ORIGIN = "checkpoint", "origin.json"
_MANY_POINTS = 10_000
# Of another disk, one that has no links, or one file with too many of them.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
_Line = TypeVar("_Line", bound=Section)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Where a Run comes from, and what was forked from it.

    Attributes:
        parents: The Run that it was forked from, then that one's, up to the first.
        children: Those that were forked from it, oldest first.
    """

    parents: tuple[RunRow, ...]
    children: tuple[RunRow, ...]


def fork(
    studio: Studio,
    run_id: int,
    step: int,
    spec: JobSpec,
    *,
    keep: Keep = Keep.EVERYTHING,
    order: Order = runs.NOW,
) -> RunRow:
    """Put a new Run into the queue that begins from another one's Checkpoint.

    Args:
        studio: The installation.
        run_id: The other Run, in whatever state.
        step: Of the Checkpoint.
        spec: Of the new Run.
        keep: What it takes over.
        order: How it waits.

    Raises:
        NotFoundError: There is no such Run or Checkpoint.
        InputError: The spec is wrong, or does not go on from there.
        ConflictError: The queue is full.
        MachineError: The disk is full or read-only.
    """
    parent = runs.get(studio, run_id)
    found = checkpoints.get(studio, run_id, step)
    before = runs.spec_of(parent)
    check_same(before, spec)
    row = runs.new_row(studio, spec)
    if keep is Keep.EVERYTHING:
        check_steps(before, runs.spec_of(row), step, parent.total_steps)
    row.name = spec.name or parent.name
    row.parent_id, row.parent_step, row.parent_keep = run_id, step, keep
    with _prepared(studio, parent, found, keep) as prepared:
        points: list[Point] = []
        if keep is Keep.EVERYTHING:
            points = _take_over(studio.home.run(run_id), prepared, step)
            row.step = step
        # Held until its files are where a worker fetches them.
        held = replace(order, is_held=True) if studio.files.is_on else order
        _commit(studio, row, prepared, points, held)
    shared.offer_run(studio, row.id)
    if held != order:
        queue.release(studio, row.id)
    studio.dispatch.ring(Bell.TRAIN)
    return runs.get(studio, row.id)


def changed_spec(studio: Studio, run_id: int, changes: Mapping[str, Any]) -> JobSpec:
    """Return the spec of a Run with changes laid over it: of a clone, or of a fork.

    Raises:
        NotFoundError: There is no such Run.
        InputError: A field is wrong.
    """
    spec = runs.spec_of(runs.get(studio, run_id))
    return parse_spec(merge_values(spec.model_dump(mode="json"), changes))


def differences(studio: Studio, before: JobSpec, after: JobSpec) -> list[Change]:
    """Return what is different between two specs; Datasets are called by their names."""
    names = {row.sha256: row.name for row in datasets.listing(studio)}
    here, there = (_by_name(spec, names) for spec in (before, after))
    return diff(here, there)


def lineage_of(studio: Studio, run_id: int) -> Lineage:
    """Return where a Run comes from, and what was forked from it.

    Raises:
        NotFoundError: There is no such Run.
    """
    row = runs.get(studio, run_id)
    with studio.database.read() as session:
        parents, children = lineage.parents(session, row), lineage.children(session, run_id)
    return Lineage(parents=tuple(parents), children=tuple(children))


def _by_name(spec: JobSpec, names: Mapping[str, str]) -> JobSpec:
    """Return a spec that is only to be read: its Datasets have names."""
    data = spec.data
    mixture = tuple(
        part.model_copy(update={"dataset": names.get(part.dataset, part.dataset)})
        for part in data.mixture
    )
    values = {
        "dataset": names.get(data.dataset, data.dataset),
        "eval_dataset": names.get(data.eval_dataset, data.eval_dataset),
        "mixture": mixture,
    }
    return spec.model_copy(update={"data": data.model_copy(update=values)})


@contextmanager
def _prepared(studio: Studio, parent: RunRow, found: Checkpoint, keep: Keep) -> Iterator[RunFolder]:
    """Fill a folder that has no number yet; whatever is left of it afterwards is removed."""
    with disk_errors("preparing the fork"):
        path = Path(tempfile.mkdtemp(dir=studio.home.runs, prefix=".fork-"))
        try:
            origin = RunFolder(path=path).origin
            _link_all(found, origin / CHECKPOINT, parent.id)
            words = {"run": parent.id, "step": found.step, "keep": keep.value}
            write_whole(origin / ORIGIN, json.dumps(words))
            for folder in (path, *(inner for inner in path.rglob("*") if inner.is_dir())):
                _flush(folder)
            yield RunFolder(path=path)
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _link_all(found: Checkpoint, target: Path, run_id: int) -> None:
    """Give a Checkpoint's files a second name; the first may go at any moment."""
    try:
        target.mkdir(parents=True)
        for path in sorted(found.folder.rglob("*")):
            there = target / path.relative_to(found.folder)
            if path.is_dir():
                there.mkdir(exist_ok=True)
            else:
                there.parent.mkdir(exist_ok=True)
                _link(path, there)
    except FileNotFoundError as error:
        raise _pruned(run_id, found.step) from error
    if checkpoints.size_of(target) is None:
        raise _pruned(run_id, found.step)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copy2(source, target)
        _flush(target)


def _flush(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pruned(run_id: int, step: int) -> NotFoundError:
    return NotFoundError(
        f"The checkpoint of step {step} of run {run_id} was removed meanwhile.",
        "The run keeps its newest ones: choose one of those.",
    )


def _take_over(parent: RunFolder, prepared: RunFolder, step: int) -> list[Point]:
    """Copy what was measured and said up to a step; return the Points."""
    records = _copy(parent.metrics, prepared.metrics, StepRecord, step)
    _copy(parent.samples, prepared.samples, Sample, step)
    return [
        Point(step=record.step, name=name, value=value)
        for record in records
        for name, value in record.values.items()
    ]


def _copy(source: Path, target: Path, kind: type[_Line], step: int) -> list[_Line]:
    """Copy the lines of steps up to one; a line that is not whole is left out."""
    if not source.exists():
        return []
    found = []
    with source.open("rb") as lines, target.open("wb") as file:
        for line in lines:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                continue
            found.append(kind.model_validate_json(line))
            file.write(line)
    return found


def _commit(
    studio: Studio, row: RunRow, prepared: RunFolder, points: list[Point], order: Order
) -> None:
    """Store the Run and give its folder the number, both or neither."""
    final: Path | None = None
    try:
        with studio.database.write() as session:
            queue.enter(session, row, order)
            for start in range(0, len(points), _MANY_POINTS):
                store.add_points(session, row.id, points[start : start + _MANY_POINTS])
            keep = KEEP_WORDS[Keep(row.parent_keep)]
            text = f"Forked from run {row.parent_id} at step {row.parent_step}: {keep}."
            events.add(session, RunRow, row.id, kind="forked", text=text)
            folder = studio.home.run(row.id).path
            if folder.exists():
                raise ConflictError(
                    f"The folder {folder} is there already, of a run that is not in the database.",
                    "Move it away, then fork again.",
                )
            prepared.path.rename(folder)
            final = folder
            # A row without its folder would begin anew, and nobody would see it.
            _flush(folder.parent)
    except BaseException:
        if final is not None:
            shutil.rmtree(final, ignore_errors=True)
        raise
