"""The first look at a SQLite file, before anything is written: what is refused, and why."""

import os
import pwd
import sqlite3
import stat
import time
from contextlib import closing
from pathlib import Path

from studio.disk import Home
from studio.errors import MachineError
from studio.store import probe
from studio.store.aside import files_of, folders_of_work, set_aside
from studio.store.copies import advice
from studio.store.faults import BUSY_SECONDS, damaged_error, database_errors

# Every page of files up to this size is looked at on each start: 0.1 s. Those of larger ones are
# looked at by each backup.
FULLY_CHECKED_BYTES = 64 * 2**20
_LOOKS, _LOOK_SECONDS = 10, 0.05


def refuse_read_only(path: Path) -> None:
    """See that a database and its folder can be written.

    Raises:
        MachineError: The folder is missing, or something may not be written; it says which and why.
    """
    if not path.parent.is_dir():
        raise MachineError(
            f"The folder of the database is missing: {path.parent}.",
            "Choose another home folder with --home DIR.",
        )
    for place in (path.parent, *files_of(path)):
        needed = os.R_OK | os.W_OK | (os.X_OK if place.is_dir() else 0)
        if os.access(place, needed):
            continue
        try:
            why = _why(place)
        except FileNotFoundError:
            continue  # SQLite removes its log with the last connection, at any moment
        # Once more: it may have been gone a moment ago, and be there again.
        if not os.access(place, needed):
            raise MachineError(
                f"The database cannot be written: {place} is read-only ({why}).",
                "Make it writable, or choose another home folder with --home DIR.",
            )


def _why(place: Path) -> str:
    mount = probe.find_mount(place)
    if mount is not None and os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"{mount.kind}, mounted read-only at {mount.point}"
    status = place.stat()
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = str(status.st_uid)
    return f"it belongs to {owner}, its rights are {stat.filemode(status.st_mode)}"


def refuse_unsound(path: Path, *, may_be_new: bool) -> None:
    """See that a database is there and sound, or that an empty one may take its place.

    Args:
        path: The file; the caller holds the lock that lets one process at a time open it.
        may_be_new: Whether an empty database may begin where an old one is missing. What lies
            there of the old one is moved aside: new runs would take over the folders of old ones.

    Raises:
        MachineError: The file is damaged, or missing though there is work that it must have held.
    """
    if not path.exists() or path.stat().st_size == 0:
        refuse_empty(path, may_be_new=may_be_new)
        return
    _refuse_lost_log(path)
    # Read-only, so that closing it does not write what stands in the log into a damaged file.
    uri = f"{path.resolve().as_uri()}?mode=ro"
    with database_errors(path), closing(sqlite3.connect(uri, uri=True)) as connection:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        num_tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if path.stat().st_size <= FULLY_CHECKED_BYTES:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise damaged_error(path, str(found).splitlines()[-1])
    if num_tables == 0:
        refuse_empty(path, may_be_new=may_be_new)


def refuse_empty(path: Path, *, may_be_new: bool, where: str = "") -> None:
    """See that an empty database is no loss.

    Args:
        path: The SQLite file, in the home folder.
        may_be_new: Whether what lies there of an old one shall be moved aside.
        where: Address of the PostgreSQL database that is empty; empty = the file is.

    Raises:
        MachineError: Runs, merges or chats are there that no row tells of.
    """
    home = Home(path=path.parent)
    log = path.with_name(f"{path.name}-wal")
    has_log = not where and log.exists() and log.stat().st_size > 0
    work = folders_of_work(home)
    if not work and not has_log:
        return
    if may_be_new:
        set_aside(home, [*([] if where else files_of(path)), *work])
        return
    what = f"{where or path} is {'empty' if where or path.exists() else 'missing'}"
    lies = f"{len(work)} folders of runs, merges and chats lie in {home.path}"
    if has_log:
        lies = f"its log {log.name} is there"
    raise MachineError(
        f"The database {what}, but {lies}: it was lost, or this is another one.",
        f"{advice(path)} To begin with an empty database, start with --new or "
        "STUDIO_NEW_DATABASE=1: what is there is moved into the folder aside.",
    )


def _refuse_lost_log(path: Path) -> None:
    """See that nobody deleted the write-ahead log under a database.

    SQLite creates the log before its index and deletes it after: an index alone is what remains
    where the log was deleted, or not copied. Other processes may open and close the database
    between two looks, so that one alone proves nothing.
    """
    log, index = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
    for _ in range(_LOOKS):
        if log.exists() or not index.exists():
            return
        time.sleep(_LOOK_SECONDS)
    raise MachineError(
        f"The write-ahead log {log.name} of the database {path} is missing, though it was not "
        "closed: the newest changes were in it.",
        f"Put {log.name} back from where it went; a copy needs it too. {advice(path)} To go on "
        f"without the newest changes, delete {index.name}.",
    )


def use_write_ahead_log(path: Path) -> None:
    """Switch the write-ahead log on; the file is created where there is none.

    Raises:
        MachineError: The file system cannot do it.
    """
    with database_errors(path):
        # journal_mode cannot change inside a transaction, hence a connection of its own.
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        raise MachineError(
            f"SQLite cannot use its write-ahead log in {path.parent}.",
            "Choose a folder on a local disk with --home DIR, or set STUDIO_DATABASE_URL to a "
            "PostgreSQL database.",
        )
