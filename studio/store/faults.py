"""Errors of both databases as sentences: the one door through which they leave the store."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from studio.errors import MachineError
from studio.store.copies import advice

BUSY_SECONDS = 30
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_PG_LOCKED, _PG_FULL = "55P03", "53100"
_PG_LOST = ("08", "57P0", "25P03")
_PG_FORBIDDEN = ("42501", "25006")
# What libpq says of a server that was not ready yet; these pass, a wrong password does not.
_PASSING = ("starting up", "shutting down", "recovery", "too many", "remaining connection slots")


@contextmanager
def database_errors(path: Path, address: str = "") -> Iterator[None]:
    """Translate what a database says into a sentence.

    Args:
        path: The SQLite file.
        address: Where the PostgreSQL server is, without a password; empty = SQLite is used.

    Raises:
        MachineError: The disk is full, the database locked, read-only, damaged or out of reach.
    """
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        found = _of_server(error, address) if address else _of_file(error, path)
        if found is None:
            raise
        raise found from error


def is_busy(error: DBAPIError | sqlite3.Error) -> bool:
    """Tell whether somebody else held the database for too long."""
    text = _text(error)
    return "database is locked" in text or _state(error) == _PG_LOCKED


def is_unready(error: DBAPIError) -> bool:
    """Tell whether a server was out of reach for a reason that passes, such as its restart."""
    if not _is_lost(error):
        return False
    text = _text(error)
    return "FATAL" not in text or any(words in text for words in _PASSING)


def locked_error(where: str, seconds: float) -> MachineError:
    """Return the error of a lock that did not come free."""
    return MachineError(
        f"The database has been locked for more than {seconds:g} s: {where}.",
        "Another program holds it, or the disk is very slow. Nothing is lost; try again, and end "
        "what else has the database open.",
    )


def damaged_error(path: Path, why: str) -> MachineError:
    """Return the error of a file that is no sound database."""
    return MachineError(
        f"The database is damaged ({why}): {path}.",
        f"{advice(path)} Nothing was changed; runs, datasets and merges lie beside it untouched. "
        "A file that was copied while the studio ran is damaged without its "
        f"{path.name}-wal: copy with `studio backup`.",
    )


def _of_file(error: DBAPIError | sqlite3.Error, path: Path) -> MachineError | None:
    text = _text(error)
    if is_busy(error):
        return locked_error(str(path), BUSY_SECONDS)
    if "disk is full" in text:
        return MachineError(
            "The disk is full: the database could not be written.",
            "Free some space and try again; nothing that was stored is lost.",
        )
    if "readonly" in text or "unable to open" in text:
        return MachineError(
            f"The database cannot be opened: {path} or its folder is read-only or missing.",
            "Make both writable, or choose another home folder with --home DIR.",
        )
    if "not a database" in text or "malformed" in text or "no such table" in text:
        return damaged_error(path, text.splitlines()[0])
    if "disk I/O error" in text or "locking protocol" in text:
        return MachineError(
            f"The disk failed while the database {path} was used ({text}).",
            "See that the disk is sound, that no quota is used up, and that it is no network "
            "drive, then try again.",
        )
    return None


def _of_server(error: DBAPIError | sqlite3.Error, address: str) -> MachineError | None:
    state = _state(error)
    if is_busy(error):
        return locked_error(address, BUSY_SECONDS)
    if state == _PG_FULL:
        return MachineError(
            f"The disk of the database server is full: {address}.",
            "Free some space there and try again; nothing that was stored is lost.",
        )
    if state.startswith(_PG_FORBIDDEN):
        return MachineError(
            f"The database server {address} refuses to be written ({_reason(error)}).",
            "Give the user of STUDIO_DATABASE_URL the right to create and change tables, on the "
            "server that is not a replica.",
        )
    if "invalid connection option" in _text(error):
        return MachineError(
            f"STUDIO_DATABASE_URL has an option that is not known ({_reason(error)}).",
            "https://www.postgresql.org/docs/current/libpq-connect.html lists them.",
        )
    if _is_lost(error):
        return MachineError(
            f"The database server {address} cannot be reached ({_reason(error)}).",
            "See that it runs and that STUDIO_DATABASE_URL is right; the studio connects again by "
            "itself. What was not confirmed may not be stored.",
        )
    return None


def _is_lost(error: DBAPIError | sqlite3.Error) -> bool:
    import psycopg  # 0.2 s, and only where PostgreSQL is used

    lost = isinstance(error, DBAPIError) and isinstance(error.orig, psycopg.OperationalError)
    # libpq gives no code for what happens while it connects, or when the line is cut.
    return lost and (not _state(error) or _state(error).startswith(_PG_LOST))


def _state(error: DBAPIError | sqlite3.Error) -> str:
    """Return PostgreSQL's code of an error; empty where it has none."""
    if not isinstance(error, DBAPIError) or isinstance(error.orig, sqlite3.Error):
        return ""
    import psycopg  # 0.2 s, and only where PostgreSQL is used

    return (error.orig.sqlstate or "") if isinstance(error.orig, psycopg.Error) else ""


def _text(error: DBAPIError | sqlite3.Error) -> str:
    return str(error.orig if isinstance(error, DBAPIError) else error)


def _reason(error: DBAPIError | sqlite3.Error) -> str:
    """Return the first line of what a server or libpq said, without what stands around it."""
    first = next(iter(_text(error).splitlines()), "")
    return first.rpartition("FATAL:")[2].rpartition("failed:")[2].strip() or "no reason given"
