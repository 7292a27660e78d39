"""Copies of the SQLite database: made while it is used, checked, described, the newest kept.

VACUUM INTO reads one state of the database however much is written meanwhile; a plain copy of the
file is damaged. Of flipped bytes within a value SQLite knows nothing, hence the copy's hash.
"""

import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from studio.disk import Home, write_whole
from studio.errors import ConflictError, MachineError, disk_errors
from studio.store.copies import SUFFIX, Copy, Manifest, file_sha256, listing, manifest_path
from studio.store.faults import BUSY_SECONDS, damaged_error, database_errors
from studio.whole import locked

if TYPE_CHECKING:  # a Database makes a copy before it changes its schema
    from studio.store.database import Database

KEPT = 7
DAY_SECONDS = 86_400.0
NOT_OF_A_SERVER = (
    "The studio copies SQLite only; this database is {address}.",
    "Copy it with `pg_dump --format=custom NAME > FILE`, and put it back with `pg_restore`.",
)


def backup(database: "Database", reason: str) -> Copy:
    """Copy a database into `backups/`.

    Raises:
        ConflictError: It is on a PostgreSQL server, which has tools of its own.
        MachineError: The disk is full or read-only, or the database is damaged.
    """
    if database.dialect != "sqlite":
        message, hint = NOT_OF_A_SERVER
        raise ConflictError(message.format(address=database.address), hint)
    return copy_file(database.path, reason)


def backup_if_due(database: "Database", home: Home, now: float | None = None) -> Copy | None:
    """Copy a database once a day.

    Args:
        database: Of PostgreSQL there is nothing to do.
        home: Its home folder.
        now: Seconds since 1970; None is now.

    Returns:
        The copy; None when the newest is younger than a day.

    Raises:
        MachineError: The disk is full or read-only, or the database is damaged.
    """
    if database.dialect != "sqlite":
        return None
    newest = next(iter(listing(home.backups)), None)
    age = DAY_SECONDS if newest is None else (time.time() if now is None else now) - newest.made_at
    # A copy from the future was made before somebody put the clock back.
    return copy_file(database.path, "daily") if not 0 <= age < DAY_SECONDS else None


def copy_file(path: Path, reason: str) -> Copy:
    """Copy a SQLite file into `backups/` beside it, and drop all but the newest copies.

    Args:
        path: The database; others may use it meanwhile.
        reason: Why, for its manifest.

    Raises:
        MachineError: The disk is full or read-only, or the database is damaged.
    """
    folder = Home(path=path.parent).backups
    part = folder / f".part{SUFFIX}"
    with disk_errors("copying the database"), locked(folder / ".lock"):
        folder.chmod(0o700)
        _need_room(path)
        try:
            _remove(part)  # of a process that was killed
            revision = _vacuum(path, part)
            made_at = time.time()
            manifest = Manifest(
                made_at=made_at,
                reason=reason,
                sha256=file_sha256(part),
                size_bytes=part.stat().st_size,
                revision=revision,
                sqlite=sqlite3.sqlite_version,
                folders=_folders(path.parent),
            )
            target = _free_name(folder, made_at, revision)
            # The copy's own name comes last: what has it is whole.
            write_whole(manifest_path(target), manifest.model_dump_json(indent=1))
            part.rename(target)
        finally:
            _remove(part)
        for old in listing(folder)[KEPT:]:
            old.path.unlink(missing_ok=True)
            manifest_path(old.path).unlink(missing_ok=True)
    return Copy(path=target, made_at=made_at, manifest=manifest)


def check(path: Path, blamed: Path) -> str | None:
    """See that a SQLite file that nobody uses is sound.

    Args:
        path: The file.
        blamed: The file that a damage is said of.

    Returns:
        The revision of its schema; None when it has no tables.

    Raises:
        MachineError: It is damaged.
    """
    uri = f"{path.resolve().as_uri()}?mode=ro"
    with database_errors(blamed), closing(sqlite3.connect(uri, uri=True)) as connection:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise damaged_error(blamed, str(found).splitlines()[-1])
        named = "SELECT count(*) FROM sqlite_master WHERE name = 'alembic_version'"
        if not connection.execute(named).fetchone()[0]:
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if row is None else str(row[0])


def _vacuum(path: Path, part: Path) -> str | None:
    uri = f"{path.resolve().as_uri()}?mode=rw"
    with database_errors(path), closing(sqlite3.connect(uri, uri=True)) as connection:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        connection.execute("VACUUM INTO ?", (str(part),))
    part.chmod(0o600)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    return check(part, blamed=path)


def _need_room(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    size = path.stat().st_size + (log.stat().st_size if log.exists() else 0)
    free = shutil.disk_usage(path.parent).free
    # What is left must do for those who write meanwhile.
    if free < 2 * size:
        raise MachineError(
            f"The disk is too full to copy the database: {free / 2**20:.0f} MiB are free, "
            f"{2 * size / 2**20:.0f} MiB are needed.",
            "Free some space and try again.",
        )


def _folders(home: Path) -> dict[str, dict[str, int]]:
    found = [*home.glob("runs/*/adapter"), *home.glob("runs/*/model"), *home.glob("merges/*/model")]
    return {
        str(folder.relative_to(home)): {
            str(file.relative_to(folder)): file.stat().st_size
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        for folder in sorted(found)
    }


def _free_name(folder: Path, made_at: float, revision: str | None) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(made_at))
    name, number = f"studio-{stamp}-{revision or 'empty'}", 1
    while (path := folder / f"{name}{'' if number == 1 else f'-{number}'}{SUFFIX}").exists():
        number += 1
    return path


def _remove(part: Path) -> None:
    for path in (part, part.with_name(f"{part.name}-journal")):
        path.unlink(missing_ok=True)
