"""The copies of the database that lie in `backups/`: their names and what is known of each."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from studio.disk import Home
from studio.domain.section import Section

SUFFIX = ".db"
_HOUR_SECONDS = 3600.0


class Manifest(Section):
    """What a copy holds, as it was made.

    Attributes:
        version: Of this description.
        made_at: Seconds since 1970.
        reason: Why it was made.
        sha256: Of the copy's bytes.
        revision: Of the schema; None of a database without tables.
        sqlite: Version of the library that wrote it.
        folders: Adapters and models that lay in the home folder then: the size in bytes of each of
            their files. They are not part of the copy.
    """

    version: int = 1
    made_at: float
    reason: str
    sha256: str
    size_bytes: int
    revision: str | None
    sqlite: str
    folders: dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """One copy of the database.

    Attributes:
        manifest: What is known of it; None where its manifest is missing or not understood.
    """

    path: Path
    made_at: float
    manifest: Manifest | None

    @property
    def name(self) -> str:
        """What `studio restore` calls it."""
        return self.path.name


def manifest_path(copy: Path) -> Path:
    """Return where the manifest of a copy lies."""
    return copy.with_suffix(".json")


def read_copy(path: Path) -> Copy:
    """Return a copy with what is known of it; the file must be there."""
    manifest = None
    try:
        manifest = Manifest.model_validate_json(manifest_path(path).read_bytes())
    except (OSError, ValidationError):
        return Copy(path=path, made_at=path.stat().st_mtime, manifest=None)
    return Copy(path=path, made_at=manifest.made_at, manifest=manifest)


def file_sha256(path: Path) -> str:
    """Return the hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(folder: Path) -> list[Copy]:
    """Return the copies in a folder, newest first; none where there is no folder."""
    found = [read_copy(path) for path in folder.glob(f"[!.]*{SUFFIX}")]
    return sorted(found, key=lambda copy: (copy.made_at, copy.name), reverse=True)


def words(copy: Copy, now: float | None = None) -> str:
    """Return a copy's name and age."""
    hours = ((time.time() if now is None else now) - copy.made_at) / _HOUR_SECONDS
    return f"{copy.name} ({age_words(hours)})"


def age_words(hours: float) -> str:
    """Return an age in words."""
    if hours < 1:
        return "less than an hour old"
    return f"{hours:.0f} hours old" if hours < 48 else f"{hours / 24:.0f} days old"


def advice(database: Path) -> str:
    """Return what to do where a database cannot be used: sentences that name the newest copy."""
    folder = Home(path=database.parent).backups
    newest = next(iter(listing(folder)), None)
    if newest is None:
        return f"There is no backup in {folder}."
    return (
        f"The newest backup is {words(newest)}: `studio restore {newest.name}` puts it in place "
        "and keeps the present file aside."
    )
