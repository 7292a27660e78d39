"""Verbs of Datasets: check, import, list, look at, remove."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from studio.disk import Home
from studio.domain.conversation import Kind, Record
from studio.domain.validation import Report
from studio.errors import ConflictError, InputError, NotFoundError, disk_errors
from studio.intake.archive import Limits
from studio.intake.canonical import Canonical
from studio.intake.formats import Mapping
from studio.intake.names import dataset_name
from studio.intake.openai import to_line
from studio.intake.read import Progress, no_progress
from studio.intake.stored import Taken, checked_size, sha256_of, take_file
from studio.intake.texts import visible_texts
from studio.intake.transfer import check_room
from studio.services import shelf
from studio.services.studio import Studio
from studio.store import datasets as store
from studio.store.rows import DatasetRow

EXAMPLE_NAME = "tidemark-support"
# Text that packs twenty times as well as usual is a bomb rather than a Dataset.
MAX_UNPACKED = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What became of a file.

    Attributes:
        row: The Dataset; None when nothing was stored.
        is_new: False when the same content is a Dataset already: that one.
        source_sha256: Hash of the file's bytes.
        rejects: The bad records as JSON lines; None when there are none.
    """

    row: DatasetRow | None
    report: Report
    is_new: bool
    source_sha256: str
    rejects: Path | None


# ---- take in ----------------------------------------------------------------------------------


def import_file(
    studio: Studio,
    path: Path,
    name: str = "",
    *,
    mapping: Mapping | None = None,
    drop_rejected: bool = False,
    source: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Imported:
    """Turn a file into a Dataset.

    The same content is stored once: importing it again returns the Dataset that is there.

    Args:
        studio: The installation.
        path: The file, on this machine.
        name: Name of the Dataset; that of the file where it came from when empty.
        mapping: What the columns of a table are.
        drop_rejected: Store the good records of a file that has bad ones too.
        source: How the file came: `type`, `name` and more; its `sha256` is believed.
        progress: Called with the share that is done, 0 to 1.

    Returns:
        The Dataset and the Report. Without a Dataset nothing is stored but the bad records, for a
        day, so that they can be looked at.

    Raises:
        InputError: The file cannot be read, or is larger than the settings allow.
        MachineError: The disk is full; nothing is kept.
    """
    size = checked_size(path, studio.settings.max_upload_bytes)
    check_room(size, studio.home.incoming, studio.settings.min_free_bytes)
    limits = Limits(max_bytes=studio.settings.max_upload_bytes * MAX_UNPACKED)
    origin = {"type": "path", "name": path.name, **(source or {})}
    with disk_errors("storing the dataset"), shelf.workshop(studio.home) as folder:
        called = str(origin["name"])
        taken = take_file(
            path, folder, limits=limits, mapping=mapping, progress=progress, name=called
        )
        origin["sha256"] = origin.get("sha256") or sha256_of(path)
        row, is_new = None, False
        if taken.report.is_accepted or (drop_rejected and taken.report.is_salvageable):
            assert taken.written is not None
            fresh = shelf.new_row(taken.written, taken.report, name or dataset_name(called), origin)
            row, is_new = shelf.add(studio, fresh, taken.written, taken.rejects)
        return Imported(
            row=row,
            report=taken.report,
            is_new=is_new,
            source_sha256=origin["sha256"],
            rejects=_rejects(studio.home, row, taken, origin["sha256"]),
        )


def _rejects(home: Home, row: DatasetRow | None, taken: Taken, source_sha256: str) -> Path | None:
    if row is not None:
        return rejects(home, row)
    if taken.rejects is None:
        return None
    return taken.rejects.replace(home.rejects(source_sha256))


def check_file(
    path: Path,
    *,
    mapping: Mapping | None = None,
    max_bytes: int = 2**31,
    rejects: Path | None = None,
    progress: Progress = no_progress,
    name: str = "",
) -> Report:
    """Read a file as `import_file` does, and store nothing.

    Args:
        path: The file.
        mapping: What the columns of a table are.
        max_bytes: Largest file.
        rejects: Where the bad records are written, if there are any.
        progress: Called with the share that is done, 0 to 1.
        name: What the file was called where it came from, if it has another name here.

    Raises:
        InputError: The file cannot be read, or is larger than allowed.
        MachineError: The disk is full.
    """
    checked_size(path, max_bytes)
    limits = Limits(max_bytes=max_bytes * MAX_UNPACKED)
    with disk_errors("checking the file"), tempfile.TemporaryDirectory() as folder:
        taken = take_file(
            path, Path(folder), limits=limits, mapping=mapping, progress=progress, name=name
        )
        if rejects is not None and taken.rejects is not None:
            rejects.write_bytes(taken.rejects.read_bytes())
    return taken.report


def import_example(studio: Studio) -> DatasetRow:
    """Import the example data set that is shipped with the studio, once."""
    path = example_file(studio)
    source = {"type": "example", "name": path.name}
    imported = import_file(studio, path, EXAMPLE_NAME, source=source)
    if imported.row is None:
        first = imported.report.issues[0]
        raise InputError(f"The shipped data set is damaged: {first}.", "Reinstall.")
    return imported.row


def example_file(studio: Studio) -> Path:
    """Return the path of the shipped example data set."""
    return studio.templates / "data" / f"{EXAMPLE_NAME}.jsonl"


@cache
def example_sha256(path: Path) -> str:
    """Return the content hash that a shipped data set has as a Dataset."""
    with tempfile.TemporaryDirectory() as name:
        taken = take_file(path, Path(name), limits=Limits(), mapping=None, progress=no_progress)
    assert taken.written is not None
    return taken.written.sha256


# ---- look at ----------------------------------------------------------------------------------


def listing(studio: Studio) -> Sequence[DatasetRow]:
    """Return all Datasets, newest first."""
    with studio.database.read() as session:
        return store.listing(session)


def get(studio: Studio, key: str, field: str = "data.dataset") -> DatasetRow:
    """Return a Dataset by name, number or content hash.

    Args:
        studio: The installation.
        key: Name, number or content hash.
        field: Field of a spec that names it.

    Raises:
        NotFoundError: There is none.
    """
    with studio.database.read() as session:
        row = store.find(session, key)
        known = sorted(store.names(session)) if row is None else []
    if row is None:
        there = f"There are: {', '.join(known[:10])}." if known else "There are none yet."
        raise NotFoundError(
            f"There is no dataset {key!r}." if key else "No dataset is chosen.",
            f"{there} Add one on the Datasets page, or with `studio dataset add FILE`.",
            field=field,
        )
    return row


@contextmanager
def canonical(home: Home, row: DatasetRow) -> Iterator[Canonical]:
    """Open the records of a Dataset.

    Raises:
        NotFoundError: Its file is gone, or was changed from outside.
        MachineError: Its index is missing and cannot be written.
    """
    with disk_errors("opening the dataset"):
        opened = _open(home.dataset(row.sha256), home.dataset_index(row.sha256), row)
    with opened:
        yield opened


def _open(path: Path, index: Path, row: DatasetRow) -> Canonical:
    try:
        size = path.stat().st_size
        if size == row.size_bytes:
            return Canonical(path, index, Kind(row.kind))
        fault = f"was changed from outside: it has {size:,} bytes instead of {row.size_bytes:,}"
    except FileNotFoundError:
        fault = "is gone from the home folder"
    raise NotFoundError(
        f"The file of dataset {row.name!r} {fault}.",
        "Add the dataset again; the same content takes its place.",
    )


def records(home: Home, row: DatasetRow, start: int, count: int) -> list[Record]:
    """Return `count` records from number `start` (from 0)."""
    with canonical(home, row) as opened:
        return opened.slice(start, count)


def find(
    home: Home,
    row: DatasetRow,
    text: str,
    start: int = 0,
    *,
    ignore_case: bool = True,
    role: str | None = None,
) -> int | None:
    """Return the number of the first record from `start` that holds a text; None without.

    Args:
        home: The home folder.
        row: The Dataset.
        text: What is looked for.
        start: Number of the first record that is looked at, from 0.
        ignore_case: Whether small and capital letters are the same.
        role: Only in what this role says; None for everywhere.
    """
    with canonical(home, row) as opened:
        for number in opened.hits(text, start, ignore_case=ignore_case):
            if role is None or _says(opened[number], role, text, ignore_case=ignore_case):
                return number
    return None


def _says(record: Record, role: str, text: str, *, ignore_case: bool) -> bool:
    said = (found for who, found in visible_texts(record) if who == role)
    if ignore_case:
        return any(text.lower() in found.lower() for found in said)
    return any(text in found for found in said)


def export(studio: Studio, row: DatasetRow, folder: Path) -> Path:
    """Write a Dataset as JSON lines that others read too, OpenAI messages where it can be.

    Args:
        studio: The installation.
        row: The Dataset.
        folder: Where the file is written, under the Dataset's name.

    Raises:
        NotFoundError: The Dataset's file is gone.
        MachineError: The disk is full.
    """
    path = folder / f"{shelf.file_name(row.name)}.jsonl"
    with (
        disk_errors("exporting the dataset"),
        canonical(studio.home, row) as opened,
        path.open("wb") as file,
    ):
        file.writelines(to_line(record) for record in opened)
    return path


def rejects(home: Home, row: DatasetRow) -> Path | None:
    """Return the records that were dropped when a Dataset was stored; None without."""
    path = home.dataset_rejects(row.sha256)
    return path if path.exists() else None


# ---- change -----------------------------------------------------------------------------------


def rename(studio: Studio, key: str, name: str) -> DatasetRow:
    """Give a Dataset another name.

    Raises:
        NotFoundError: There is no such Dataset.
        InputError: The name is empty.
        ConflictError: Another Dataset has it.
    """
    wanted = shelf.clean_name(name)
    if not wanted:
        raise InputError("The name is empty.", "Write a name.", field="name")
    found = get(studio, key)
    with studio.database.write() as session:
        row = session.get_one(DatasetRow, found.id)
        if wanted != row.name and wanted in store.names(session):
            raise ConflictError(
                f"Another dataset is named {wanted!r}.", "Choose another name.", field="name"
            )
        row.name = wanted
    return get(studio, found.sha256)


def delete(studio: Studio, key: str) -> None:
    """Remove a Dataset and its files.

    Raises:
        NotFoundError: There is no such Dataset.
        ConflictError: Runs have used it.
    """
    row = get(studio, key)
    with studio.database.write() as session:
        runs = store.runs_of(session, row)
        if runs:
            named = ", ".join(str(run) for run in runs[:10]) + (", ..." if len(runs) > 10 else "")
            raise ConflictError(
                f"Dataset {row.name!r} is part of {len(runs)} runs: {named}.",
                "It stays, so that these runs can be repeated.",
            )
        store.delete_row(session, row)
    shelf.remove_unnamed(studio, row.sha256)
