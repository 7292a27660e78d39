"""Verbs of versions: exclude, tag and edit records, and save what comes of it as a new Dataset.

A Dataset itself never changes. What a person changes waits in an overlay, one row a record; the
last one who writes a record wins.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from studio.domain.conversation import RECORD_TYPES, Kind, Record
from studio.domain.strict_json import RecordError
from studio.domain.validation import Report, check_record, short
from studio.errors import ConflictError, InputError, NotFoundError, disk_errors
from studio.intake.canonical import Canonical, Writer, Written
from studio.intake.findings import Findings
from studio.intake.openai import from_text, to_text
from studio.intake.stored import with_duplicates
from studio.services import datasets, shelf
from studio.services.studio import Studio
from studio.store import datasets as store
from studio.store.datasets import Waiting
from studio.store.rows import DatasetRow, EditRow

MAX_TAGS, MAX_TAG_CHARACTERS = 20, 60
MAX_TEXT_CHARACTERS = 2**24  # as long as a line of a file may be


@dataclass(frozen=True, kw_only=True, slots=True)
class Current:
    """A record as the next version will have it.

    Attributes:
        text: The record as JSON, for `edit`.
    """

    record: Record
    is_excluded: bool
    is_edited: bool
    tags: tuple[str, ...]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """Numbers of the records that the next version changes, from 0."""

    excluded: tuple[int, ...]
    edited: tuple[int, ...]
    tagged: tuple[int, ...]


def current(studio: Studio, key: str, number: int) -> Current:
    """Return a record with what was changed of it.

    Raises:
        NotFoundError: There is no such Dataset or record.
    """
    row = datasets.get(studio, key)
    _check_numbers(row, [number])
    with datasets.canonical(studio.home, row) as opened:
        base = opened[number]
    with studio.database.read() as session:
        edited = store.edit(session, row.id, number)
    record = base if edited is None else _changed(base, edited)
    return Current(
        record=record,
        is_excluded=edited is not None and edited.excluded,
        is_edited=edited is not None and edited.record is not None,
        tags=record.tags,
        text=to_text(record),
    )


def exclude(studio: Studio, key: str, numbers: Sequence[int]) -> None:
    """Leave records out of the next version.

    Raises:
        NotFoundError: There is no such Dataset or record.
    """
    _put(studio, key, numbers, excluded=True)


def restore(studio: Studio, key: str, numbers: Sequence[int]) -> None:
    """Take excluded records in again.

    Raises:
        NotFoundError: There is no such Dataset or record.
    """
    _put(studio, key, numbers, excluded=False)


def tag(studio: Studio, key: str, number: int, tags: Iterable[str]) -> None:
    """Give a record these tags instead of those that it has.

    Raises:
        NotFoundError: There is no such Dataset or record.
        InputError: There are too many tags, or one is too long.
    """
    wanted = tuple(dict.fromkeys(filter(None, (" ".join(word.split()) for word in tags))))
    if len(wanted) > MAX_TAGS:
        raise InputError(
            f"The conversation has {len(wanted)} tags; at most {MAX_TAGS} are kept.", "Drop some."
        )
    for word in wanted:
        if len(word) > MAX_TAG_CHARACTERS or not word.isprintable():
            raise InputError(
                f"The tag {short(word)!r} is too long or cannot be printed.",
                f"Write at most {MAX_TAG_CHARACTERS} characters.",
            )
    row = datasets.get(studio, key)
    is_same = _base(studio, row, number).tags == wanted
    _put(studio, row.sha256, [number], tags=None if is_same else list(wanted))


def edit(studio: Studio, key: str, number: int, text: str) -> None:
    """Change a record.

    Args:
        studio: The installation.
        key: The Dataset.
        number: The record, from 0.
        text: The record as JSON, as `current` shows it.

    Raises:
        NotFoundError: There is no such Dataset or record.
        InputError: It is no such record, or breaks a rule; names the place and the reason.
    """
    row = datasets.get(studio, key)
    base = _base(studio, row, number)
    record = _read(text, Kind(row.kind))
    is_same = msgspec.structs.replace(base, tags=record.tags) == record
    _put(studio, row.sha256, [number], record=None if is_same else record.to_json())


def _read(text: str, kind: Kind) -> Record:
    if len(text) > MAX_TEXT_CHARACTERS:
        raise InputError(
            f"The record has {len(text):,} characters, more than {MAX_TEXT_CHARACTERS:,}.",
            "Shorten it.",
        )
    try:
        record = from_text(text, kind)
    except RecordError as error:
        found = f" (found {short(error.value)})" if error.value not in (None, "") else ""
        raise InputError(f"{error}{found}.", "Correct it; the record was not changed.") from error
    for issue in check_record(record):
        if issue.severity == "error":
            raise InputError(f"{issue}.", "Correct it; the record was not changed.")
    return record


def changes(studio: Studio, key: str) -> Changes:
    """Return what waits for the next version.

    Raises:
        NotFoundError: There is no such Dataset.
    """
    row = datasets.get(studio, key)
    with studio.database.read() as session:
        return Changes(
            excluded=tuple(store.numbers(session, row.id, EditRow.excluded.is_(True))),
            edited=tuple(store.numbers(session, row.id, EditRow.record.is_not(None))),
            tagged=tuple(store.numbers(session, row.id, EditRow.tags.is_not(None))),
        )


def discard(studio: Studio, key: str) -> None:
    """Forget what waits for the next version.

    Raises:
        NotFoundError: There is no such Dataset.
    """
    row = datasets.get(studio, key)
    with studio.database.write() as session:
        store.drop_edits(session, row.id)


def drop_duplicates(studio: Studio, key: str, near: bool) -> int:
    """Exclude all but the first record of each group of duplicates.

    Args:
        studio: The installation.
        key: The Dataset.
        near: Whether nearly equal records are duplicates too.

    Returns:
        How many were excluded that were not before. What was edited or excluded is in no group.

    Raises:
        NotFoundError: There is no such Dataset.
    """
    row = datasets.get(studio, key)
    done = changes(studio, row.sha256)
    with datasets.canonical(studio.home, row) as opened:
        groups = np.array(opened.groups) if near else opened.equals()
    is_open = np.ones(len(groups), np.bool_)
    is_open[[*done.excluded, *done.edited]] = False
    members = np.flatnonzero(is_open)
    _, firsts = np.unique(groups[members], return_index=True)
    dropped = np.delete(members, firsts)
    _put(studio, row.sha256, dropped.tolist(), excluded=True)
    return len(dropped)


# ---- save -------------------------------------------------------------------------------------


def save(studio: Studio, key: str, name: str = "") -> DatasetRow:
    """Write what waits as a new Dataset, which remembers what it is a version of.

    Args:
        studio: The installation.
        key: The Dataset.
        name: Name of the version; the Dataset's with a number when empty.

    Returns:
        The version, or the Dataset that has the same content already.

    Raises:
        NotFoundError: There is no such Dataset.
        ConflictError: Nothing waits.
        InputError: Every record is excluded.
        MachineError: The disk is full; nothing is kept, and what waits still does.
    """
    base = datasets.get(studio, key)
    with studio.database.read() as session:
        waiting = store.waiting(session, base.id)
    if not waiting.excluded and not waiting.changed:
        raise ConflictError(
            f"Nothing of {base.name!r} was changed.", "Exclude, tag or edit a record first."
        )
    with disk_errors("saving the version"), shelf.workshop(studio.home) as folder:
        with datasets.canonical(studio.home, base) as opened, Writer(folder) as writer:
            report = _write(writer, opened, waiting, base)
            written = writer.finish(RECORD_TYPES[Kind(base.kind)])
        report = with_duplicates(report, written.duplicates, lambda number: ("", number + 1))
        row, _ = shelf.add(studio, _version(base, written, report, waiting, name), written)
    with studio.database.write() as session:
        store.drop_saved_edits(session, base.id, waiting)
    return row


def _write(writer: Writer, opened: Canonical, waiting: Waiting, base: DatasetRow) -> Report:
    findings = Findings()
    for number, record in enumerate(opened):
        if number in waiting.excluded:
            continue
        edited = waiting.changed.get(number)
        if edited is not None:
            record = _changed(record, edited)
        writer.add(record)
        findings.count(record)
        for issue in check_record(record):
            findings.add(issue.model_copy(update={"line": findings.num_records}))
    if not findings.num_records:
        raise InputError(
            f"Every record of {base.name!r} is excluded.", "Restore some: a version needs one."
        )
    title = Report.model_validate(base.report).format
    return findings.report(kind=Kind(base.kind), title=title, columns=())


def _version(
    base: DatasetRow, written: Written, report: Report, waiting: Waiting, name: str
) -> DatasetRow:
    source = {"type": "version", "name": base.name, "sha256": base.sha256}
    row = shelf.new_row(written, report, name or base.name, source)
    row.parent_id = base.id
    row.change = {
        "excluded": len(waiting.excluded),
        "edited": sum(edit.record is not None for edit in waiting.changed.values()),
        "tagged": sum(edit.tags is not None for edit in waiting.changed.values()),
    }
    return row


def _changed(record: Record, edited: EditRow) -> Record:
    tags = record.tags if edited.tags is None else tuple(edited.tags)
    if edited.record is not None:
        record = type(record).from_json(edited.record)
    return msgspec.structs.replace(record, tags=tags)


def _base(studio: Studio, row: DatasetRow, number: int) -> Record:
    _check_numbers(row, [number])
    with datasets.canonical(studio.home, row) as opened:
        return opened[number]


def _put(studio: Studio, key: str, numbers: Sequence[int], **values: Any) -> None:
    row = datasets.get(studio, key)
    _check_numbers(row, numbers)
    with studio.database.write() as session:
        store.put_edits(session, row.id, numbers, values, time.time())


def _check_numbers(row: DatasetRow, numbers: Sequence[int]) -> None:
    for number in numbers:
        if not 0 <= number < row.num_conversations:
            raise NotFoundError(
                f"There is no conversation {number + 1} in {row.name!r}.",
                f"They go from 1 to {row.num_conversations}.",
            )
