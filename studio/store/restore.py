"""Put a copy of the database in its place; what it replaces is kept aside."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from studio.disk import Home
from studio.errors import ConflictError, MachineError, NotFoundError, disk_errors
from studio.locks import take_lock
from studio.store import backup, migrate
from studio.store.aside import files_of, folders_of_work, set_aside
from studio.store.copies import Copy, file_sha256, listing, read_copy
from studio.whole import locked

_TABLES = {"runs": "runs", "merges": "artifacts", "chats": "chats"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What was put in place.

    Attributes:
        aside: Folder of what was there before; None where nothing was.
        num_folders: Runs, merges and chats in it that the copy does not know.
    """

    copy: Copy
    aside: Path | None
    num_folders: int


def restore(home: Home, name: str) -> Restored:
    """Put a copy of the database in its place.

    Folders of runs, merges and chats that are younger than the copy are moved aside with the
    database that knew them: the next run would take over the folder of one that has its number.

    Args:
        home: The home folder; no page and no worker may be open on it.
        name: Name of a copy in `backups/`, or the path of one from elsewhere.

    Raises:
        NotFoundError: There is no such copy.
        ConflictError: A page, a worker or another process has the database open.
        MachineError: The copy is damaged or of a newer studio, or the disk is full.
    """
    copy = find_copy(home, name)
    refuse_unsound(copy)
    fresh = home.path / ".studio.db.restored"
    with disk_errors("restoring the database"), _alone(home):
        _let_go(home.database)
        try:
            shutil.copyfile(copy.path, fresh)
            fresh.chmod(0o600)
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            unknown = _unknown_folders(home, fresh)
            aside = set_aside(home, [*files_of(home.database), *unknown])
            fresh.rename(home.database)
        finally:
            fresh.unlink(missing_ok=True)
    return Restored(copy=copy, aside=aside, num_folders=len(unknown))


def find_copy(home: Home, name: str) -> Copy:
    """Return a copy by its name or path.

    Raises:
        NotFoundError: There is none.
    """
    for path in (home.backups / name, Path(name).expanduser()):
        if name and path.is_file():
            return read_copy(path)
    names = ", ".join(copy.name for copy in listing(home.backups))
    raise NotFoundError(
        f"There is no backup {name!r}.",
        f"There are: {names}." if names else f"There is none in {home.backups}.",
    )


def refuse_unsound(copy: Copy) -> None:
    """See that a copy is what it was, and of a schema that is known.

    Raises:
        MachineError: It is not.
    """
    if copy.manifest is not None and file_sha256(copy.path) != copy.manifest.sha256:
        raise MachineError(
            f"The backup {copy.name} is damaged: its bytes are not those that were written.",
            "Choose an older one.",
        )
    revision = backup.check(copy.path, blamed=copy.path)
    known = migrate.known_revisions()
    if revision not in known:
        raise MachineError(
            f"The backup {copy.name} is from a newer Delta Studio, or from none (schema "
            f"{revision or 'missing'}); this one knows schemas up to {known[-1]}.",
            "Restore it with that version, or choose another backup.",
        )


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    """Keep pages and workers out while the block runs.

    Raises:
        ConflictError: One is open on the home folder.
    """
    home.create()
    with ExitStack() as held:
        locks = [home.client_lock, home.worker_lock, *sorted(home.workers.glob("*.lock"))]
        for path in locks:
            lock = take_lock(path)
            if lock is None:
                who = "A page or a command" if path == home.client_lock else "A worker"
                raise ConflictError(
                    f"{who} is open on {home.path}.",
                    "Close the page, wait until the worker has ended, then try again.",
                )
            held.enter_context(lock)
        # Whoever opens the database waits here.
        held.enter_context(locked(home.database.with_suffix(".lock")))
        yield


def _let_go(database: Path) -> None:
    """See that no other process has a database open: what it still wrote would be lost.

    Only who is alone can switch the write-ahead log off. A damaged file is not asked.
    """
    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(database, timeout=2)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            raise ConflictError(
                f"Another process has {database} open.", "Wait until it has ended, then try again."
            ) from error


def _unknown_folders(home: Home, database: Path) -> list[Path]:
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as there:
        known = {
            f"{kind}/{number:06d}"
            for kind, table in _TABLES.items()
            for (number,) in there.execute(f"SELECT id FROM {table}")
        }
    folders = folders_of_work(home)
    return [path for path in folders if str(path.relative_to(home.path)) not in known]
