"""Verbs of uploads: begin, go on, finish, discard, sweep.

An upload is a folder `incoming/<id>/`: `data` (its size is the offset), `upload.json` (what the
browser called it, and the sha256 once it is whole) and `lock` (held by the one writer). The name
that the user gave is text and never part of a path.

Nothing is synced: after a power cut an upload is sent again, and what was imported from it was
synced on its own.
"""

import json
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from studio.domain.section import Section
from studio.errors import InputError, NotFoundError, disk_errors
from studio.intake.transfer import SourceRules, check_room
from studio.locks import take_lock
from studio.services.studio import Studio

PARTIAL_KEEP_SECONDS = 3600.0  # fault catalogue, D52
FINISHED_KEEP_SECONDS = 86_400.0
MAX_NAME_CHARACTERS = 1024
_ID = re.compile(r"[0-9a-f]{32}")


class Note(Section):
    """What `upload.json` says; the hash is empty until the upload is whole."""

    name: str
    size_bytes: int
    sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """One file that a browser sends.

    Attributes:
        id: Chosen here; names the folder.
        name: What the browser called the file; any text.
        size_bytes: Size that was announced.
        offset: Bytes that have arrived.
        sha256: Hash of the content; empty until the upload is finished.
        path: The bytes.
    """

    id: str
    name: str
    size_bytes: int
    offset: int
    sha256: str
    path: Path

    @property
    def is_finished(self) -> bool:
        """Whether all of it is here."""
        return bool(self.sha256)


def create(studio: Studio, name: str, size_bytes: int) -> Upload:
    """Begin an upload.

    Args:
        studio: The installation.
        name: What the browser calls the file.
        size_bytes: How many bytes will come.

    Raises:
        InputError: The file is empty or larger than the settings allow, or its name is too long.
        MachineError: The disk has no room for it.
    """
    sweep(studio)
    if len(name) > MAX_NAME_CHARACTERS:
        raise InputError(
            f"The file's name has {len(name)} characters, more than {MAX_NAME_CHARACTERS}.",
            "Rename the file.",
        )
    if size_bytes < 1:
        raise InputError("The file is empty.", "Choose a file that has conversations in it.")
    limit = studio.settings.max_upload_bytes
    if size_bytes > limit:
        raise InputError(
            f"The file has {size_bytes / 2**20:.1f} MiB, more than the {limit / 2**20:.1f} MiB "
            "that one file may have.",
            "Compress it with gzip, split it, or raise STUDIO_MAX_UPLOAD_BYTES.",
            "size_bytes",
        )
    promised = sum(upload.size_bytes - upload.offset for upload in _all(studio))
    incoming = studio.home.incoming
    check_room(size_bytes + promised, incoming, studio.settings.min_free_bytes)
    upload_id = secrets.token_hex(16)
    with disk_errors("beginning the upload"):
        folder = incoming / upload_id
        folder.mkdir(mode=0o700)
        (folder / "data").touch(mode=0o600)
        write_note(folder, Note(name=name, size_bytes=size_bytes))
    return find(studio, upload_id)


def find(studio: Studio, upload_id: str) -> Upload:
    """Return an upload.

    Raises:
        NotFoundError: There is none with that id, or not any more.
    """
    gone = NotFoundError(
        "The studio does not have this upload (any more).",
        "Choose the file again; what arrived of an upload is kept for one hour.",
    )
    if not _ID.fullmatch(upload_id):
        raise gone
    folder = studio.home.incoming / upload_id
    try:
        note = Note.model_validate_json((folder / "upload.json").read_bytes())
        offset = (folder / "data").stat().st_size
    except FileNotFoundError as error:
        raise gone from error
    return Upload(
        id=upload_id,
        name=note.name,
        size_bytes=note.size_bytes,
        offset=offset,
        sha256=note.sha256,
        path=folder / "data",
    )


def finished(studio: Studio, upload_ids_json: str) -> list[Upload]:
    """Return the finished uploads that the page names.

    Args:
        studio: The installation.
        upload_ids_json: A JSON list of ids; nothing when empty.

    Raises:
        InputError: It is no such list, or an upload is not whole.
        NotFoundError: There is no such upload.
    """
    try:
        ids = json.loads(upload_ids_json or "[]")
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
        raise InputError("The page named no uploads.", "Reload the page and choose the file again.")
    uploads = [find(studio, each) for each in dict.fromkeys(ids)]
    for upload in uploads:
        if not upload.is_finished:
            raise InputError(
                f"Of {upload.name!r} {upload.offset} of {upload.size_bytes} bytes have arrived.",
                "Choose the file again; the upload goes on where it stopped.",
            )
    return uploads


def discard(studio: Studio, upload_id: str) -> None:
    """Delete an upload, finished or not; a writer that is still at it writes into nothing.

    Raises:
        NotFoundError: There is none with that id.
    """
    _delete(find(studio, upload_id).path.parent)


def _delete(folder: Path) -> None:
    # Renamed first, so that nobody finds half of it.
    gone = folder.with_name(f"gone-{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone)


def sweep(studio: Studio, now: float | None = None) -> int:
    """Delete what nobody waits for any more.

    Partial uploads without progress for an hour, finished ones a day after they ended, and
    whatever else a killed process left in the folder a day ago.

    Args:
        studio: The installation.
        now: The time, in seconds since the epoch; the clock's when None.

    Returns:
        How many were deleted.
    """
    present = time.time() if now is None else now
    swept = 0
    for entry in studio.home.incoming.iterdir():
        try:
            is_partial = _ID.fullmatch(entry.name) and not find(studio, entry.name).is_finished
        except NotFoundError:
            is_partial = False
        keep = PARTIAL_KEEP_SECONDS if is_partial else FINISHED_KEEP_SECONDS
        if present - _last_change(entry) > keep and _delete_idle(entry):
            swept += 1
    return swept


def _last_change(entry: Path) -> float:
    found = [entry.lstat().st_mtime]
    found += [path.lstat().st_mtime for path in entry.rglob("*")] if entry.is_dir() else []
    return max(found)


def _delete_idle(entry: Path) -> bool:
    """Delete an entry of the folder unless someone writes it."""
    if not entry.is_dir():
        entry.unlink()
        return True
    lock = take_lock(entry / "lock")
    if lock is None:
        return False
    with lock:
        _delete(entry)
    return True


def _all(studio: Studio) -> Iterator[Upload]:
    for entry in studio.home.incoming.iterdir():
        if _ID.fullmatch(entry.name):
            try:
                yield find(studio, entry.name)
            except NotFoundError:
                continue  # discarded meanwhile


def write_note(folder: Path, note: Note) -> None:
    """Write `upload.json` so that no reader sees half of it."""
    temporary = folder / ".upload.json"
    temporary.write_text(note.model_dump_json(), encoding="utf-8")
    temporary.rename(folder / "upload.json")


# ---- other sources ----------------------------------------------------------------------------


def rules(studio: Studio) -> SourceRules:
    """Return what sources may do on this installation."""
    settings = studio.settings
    return SourceRules(
        max_bytes=settings.max_upload_bytes,
        min_free_bytes=settings.min_free_bytes,
        allow_server_paths=settings.server_paths_allowed,
        server_path_roots=settings.server_path_roots,
        allow_private_urls=settings.allow_private_urls,
        allow_http=settings.allow_http,
        proxy=settings.proxy,
        hub_endpoint=settings.hub_endpoint,
    )


def new_fetch_folder(studio: Studio) -> Path:
    """Make a folder for what a source downloads; the caller deletes it, or the sweep after a day."""
    with disk_errors("making a folder for the download"):
        return Path(tempfile.mkdtemp(dir=studio.home.incoming, prefix="fetch-"))
