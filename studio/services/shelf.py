"""Where Datasets stand: a row and its files, which come and go together."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studio.disk import Home
from studio.domain.validation import Report
from studio.intake.canonical import Written
from studio.locks import take_lock
from studio.services.studio import Studio
from studio.store import datasets as store
from studio.store.rows import DatasetRow


@contextmanager
def workshop(home: Home) -> Iterator[Path]:
    """Give a folder to write a Dataset in; what a killed process leaves in it is swept."""
    with tempfile.TemporaryDirectory(dir=home.incoming, prefix="import-") as name:
        lock = take_lock(Path(name) / "lock")
        try:
            yield Path(name)
        finally:
            if lock is not None:
                lock.close()


def new_row(written: Written, report: Report, name: str, source: dict[str, Any]) -> DatasetRow:
    """Return the row of a Dataset that is not stored yet."""
    return DatasetRow(
        name=name,
        sha256=written.sha256,
        source_name=str(source["name"]),
        num_conversations=written.num_records,
        size_bytes=written.size_bytes,
        report=report.model_dump(mode="json"),
        created_at=time.time(),
        kind=report.kind,
        source=source,
    )


def add(
    studio: Studio, row: DatasetRow, written: Written, rejects: Path | None = None
) -> tuple[DatasetRow, bool]:
    """Store a Dataset: its files are in place before anybody can find its row.

    Args:
        studio: The installation.
        row: The row; its name gets a number where another Dataset has it.
        written: Its files.
        rejects: Records that were left out of it.

    Returns:
        The row, or the one that has the same content already; and whether it is new.

    Raises:
        MachineError: The disk is full; neither row nor files are kept.
    """
    try:
        # One writer at a time, so nobody removes or stores the same content in between.
        with studio.database.write() as session:
            known = store.by_sha256(session, written.sha256)
            if known is None or not _is_whole(studio.home, written):
                _place(studio.home, written, rejects)
            if known is not None:
                return known, False
            row.name = free_name(store.names(session), row.name)
            if row.parent_id is not None and session.get(DatasetRow, row.parent_id) is None:
                row.parent_id = None  # deleted while its version was written
            session.add(row)
    except BaseException:
        remove_unnamed(studio, written.sha256)
        raise
    return row, True


def _is_whole(home: Home, written: Written) -> bool:
    path = home.dataset(written.sha256)
    return path.exists() and path.stat().st_size == written.size_bytes


def _place(home: Home, written: Written, rejects: Path | None) -> None:
    written.index.replace(home.dataset_index(written.sha256))
    if rejects is not None:
        rejects.replace(home.dataset_rejects(written.sha256))
    written.path.replace(home.dataset(written.sha256))


def remove_unnamed(studio: Studio, sha256: str) -> None:
    """Remove the files of a content that no row names."""
    home = studio.home
    with studio.database.write() as session:
        if store.by_sha256(session, sha256) is None:
            for path in (home.dataset, home.dataset_index, home.dataset_rejects):
                path(sha256).unlink(missing_ok=True)


def free_name(taken: set[str], wanted: str) -> str:
    """Return a name as near to the wanted one as others leave it."""
    base = clean_name(wanted) or "dataset"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def clean_name(wanted: str) -> str:
    """Return a name on one line, without what cannot be printed, at most 80 characters."""
    spaced = " ".join(wanted.split())
    printable = "".join(character for character in spaced if character.isprintable())
    return " ".join(printable.split())[:80]


def file_name(name: str) -> str:
    """Return a name of a Dataset as a name of a file, in letters that every system takes."""
    letters = (letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    # 255 bytes is the limit of a name on Linux; four bytes is the longest letter.
    return "".join(letters).strip("-.")[:60] or "dataset"
