"""Verbs of Datasets: check, import, list, look at."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from sqlalchemy.exc import IntegrityError

from studio.disk import Home
from studio.domain.conversation import Conversation
from studio.domain.validation import Reader, Report, open_dataset
from studio.errors import InputError, NotFoundError, disk_errors
from studio.services.studio import Studio
from studio.store import datasets as store
from studio.store.rows import DatasetRow

EXAMPLE_NAME = "tidemark-support"
Progress = Callable[[float], None]


def no_progress(_: float) -> None:
    """Report to nobody."""


def import_file(
    studio: Studio, path: Path, name: str = "", progress: Progress = no_progress
) -> tuple[DatasetRow | None, Report]:
    """Turn a file into a Dataset.

    The same content is stored once: importing it again returns the Dataset that is there.

    Args:
        studio: The installation.
        path: The file, on this machine.
        name: Name of the Dataset; the file's name when empty.
        progress: Called with the share of the file that was read, 0 to 1.

    Returns:
        The Dataset and the Report; None instead of a Dataset when the Report has errors, and
        then nothing is stored.

    Raises:
        InputError: The file cannot be read, or is larger than the settings allow.
        MachineError: The disk is full; nothing is kept.
    """
    size = _checked_size(path, studio.settings.max_upload_bytes)
    with (
        disk_errors("storing the dataset"),
        open_dataset(path) as source,
        tempfile.TemporaryDirectory(dir=studio.home.incoming) as folder,
    ):
        reader, digest = Reader(), hashlib.sha256()
        canonical = Path(folder) / "canonical.jsonl"
        with canonical.open("wb") as file:
            for number, conversation in enumerate(reader.read(source)):
                line = (conversation.to_json() + "\n").encode("utf-8")
                digest.update(line)
                file.write(line)
                if number % 200 == 0:
                    progress(source.tell() / max(size, 1))
        report = reader.report()
        if not report.is_accepted:
            return None, report
        progress(1.0)
        row = _store(studio, canonical, digest.hexdigest(), name or path.stem, path.name, report)
        return row, report


def _checked_size(path: Path, limit: int) -> int:
    with open_dataset(path) as source:
        source.seek(0, 2)
        size = source.tell()
    if size > limit:
        raise InputError(
            f"The file {path.name} has {size / 2**20:.0f} MiB, more than the {limit / 2**20:.0f} "
            "MiB that one file may have.",
            "Split it, or raise STUDIO_MAX_UPLOAD_BYTES.",
        )
    return size


def _store(
    studio: Studio, canonical: Path, sha256: str, name: str, source_name: str, report: Report
) -> DatasetRow:
    with studio.database.read() as session:
        known = store.by_sha256(session, sha256)
    if known is not None:
        return known
    target = studio.home.dataset(sha256)
    canonical.replace(target)
    try:
        with studio.database.write() as session:
            row = DatasetRow(
                name=_free_name(store.names(session), name),
                sha256=sha256,
                source_name=source_name,
                num_conversations=report.num_conversations,
                size_bytes=target.stat().st_size,
                report=report.model_dump(mode="json"),
                created_at=time.time(),
            )
            session.add(row)
    except IntegrityError:  # another browser stored the same content at this moment
        return get(studio, sha256)
    return row


def _free_name(taken: set[str], wanted: str) -> str:
    printable = "".join(character for character in wanted if character.isprintable())
    base = " ".join(printable.split())[:80] or "dataset"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def import_example(studio: Studio) -> DatasetRow:
    """Import the example data set that is shipped with the studio, once."""
    row, report = import_file(studio, example_file(studio), EXAMPLE_NAME)
    if row is None:
        raise InputError(f"The shipped data set is damaged: {report.issues[0]}.", "Reinstall.")
    return row


def example_file(studio: Studio) -> Path:
    """Return the path of the shipped example data set."""
    return studio.templates / "data" / f"{EXAMPLE_NAME}.jsonl"


@cache
def example_sha256(path: Path) -> str:
    """Return the content hash that a shipped data set has as a Dataset."""
    digest = hashlib.sha256()
    with open_dataset(path) as source:
        for conversation in Reader().read(source):
            digest.update((conversation.to_json() + "\n").encode("utf-8"))
    return digest.hexdigest()


def listing(studio: Studio) -> Sequence[DatasetRow]:
    """Return all Datasets, newest first."""
    with studio.database.read() as session:
        return store.listing(session)


def get(studio: Studio, key: str) -> DatasetRow:
    """Return a Dataset by name, number or content hash.

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
            field="data.dataset",
        )
    return row


def conversations(home: Home, row: DatasetRow, start: int, count: int) -> list[Conversation]:
    """Return `count` Conversations from number `start` (from 0)."""
    with _canonical(home, row) as file:
        return [
            Conversation.from_json(line.decode("utf-8"))
            for line in islice(file, start, start + count)
        ]


def _canonical(home: Home, row: DatasetRow) -> BinaryIO:
    try:
        return home.dataset(row.sha256).open("rb")
    except OSError as error:
        raise NotFoundError(
            f"The file of dataset {row.name!r} is gone from the home folder.",
            "Add the dataset again; the same content takes its place.",
        ) from error
