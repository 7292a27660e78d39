"""Files on their way to become Datasets: uploaded, or fetched from a path, the hub or an address.

An Arrival stays until it is stored or given up, so that a person can look at what is wrong with it
and then keep what is good. What nobody decides on is swept with the uploads.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from studio.errors import InputError, NotFoundError
from studio.intake.formats import Mapping
from studio.intake.read import no_progress
from studio.intake.sources import fetch
from studio.services import datasets, uploads
from studio.services.datasets import Imported
from studio.services.studio import Studio

Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A file that waits to be read.

    Attributes:
        origin: How it came, as a Dataset remembers it.
        upload: Number of the upload, empty when it is none.
        folder: Folder that was made for it, removed with it; None when there is none.
    """

    path: Path
    name: str
    origin: dict[str, str]
    upload: str = ""
    folder: Path | None = None


def from_uploads(studio: Studio, ids: str) -> list[Arrival]:
    """Return the finished uploads that a JSON list of numbers names.

    Raises:
        InputError: The list is none, or an upload is not finished or gone.
    """
    return [
        Arrival(
            path=upload.path,
            name=upload.name,
            origin={"type": "upload", "name": upload.name, "sha256": upload.sha256},
            upload=upload.id,
        )
        for upload in uploads.finished(studio, ids)
    ]


def from_source(studio: Studio, source: str, progress: Progress) -> Arrival:
    """Fetch what a path, a hub id or an address names; a path is used in place.

    Raises:
        InputError: It is none, is not allowed, or holds no data.
        MachineError: It does not fit on the disk.
    """
    folder = uploads.new_fetch_folder(studio)
    try:
        found = fetch(source, folder, rules=uploads.rules(studio), progress=progress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # The shards of one dataset lie in the folder, and are read as one.
    path = found.path if len(found.paths) == 1 else folder
    return Arrival(
        path=path,
        name=found.name,
        origin={"type": found.origin["kind"], "name": found.name, **found.origin},
        folder=folder,
    )


def from_path(path: Path) -> Arrival:
    """Return a file or folder that whoever types the command may read, to be used in place."""
    whole = path.resolve()
    origin = {"type": "path", "name": whole.name, "source": str(whole)}
    return Arrival(path=whole, name=whole.name, origin=origin)


def mapping_of(columns: dict[str, str]) -> Mapping:
    """Return what the columns of a table hold, as somebody chose them.

    Raises:
        InputError: The choice is not complete, or names a column twice.
    """
    try:
        return Mapping(**columns)
    except ValidationError as error:
        words = error.errors()[0]["msg"].removeprefix("Value error, ")
        chosen = ", ".join(f"{field} = {column}" for field, column in columns.items())
        raise InputError(
            f"The columns are not clear yet ({chosen or 'none is chosen'}): {words}.",
            "A table needs a question and an answer, or one text.",
        ) from error


def take(
    studio: Studio,
    arrival: Arrival,
    *,
    name: str = "",
    mapping: Mapping | None = None,
    drop_rejected: bool = False,
    progress: Progress = no_progress,
) -> Imported:
    """Read an Arrival; store it when nothing is wrong, or when what is wrong shall be dropped.

    Raises:
        InputError: It is gone, or is larger than the settings allow.
        MachineError: The disk is full.
    """
    if not arrival.path.exists():
        raise NotFoundError(
            f"{arrival.name} is not here any more: files that nobody decides on are swept.",
            "Add it again.",
        )
    imported = datasets.import_file(
        studio,
        arrival.path,
        name,
        mapping=mapping,
        drop_rejected=drop_rejected,
        source=arrival.origin,
        progress=progress,
    )
    if imported.row is not None:
        discard(studio, arrival)
    return imported


def discard(studio: Studio, arrival: Arrival) -> None:
    """Remove an Arrival's bytes; a file that was used in place stays."""
    if arrival.upload:
        uploads.discard(studio, arrival.upload)
    if arrival.folder is not None:
        shutil.rmtree(arrival.folder, ignore_errors=True)
