"""The database: connections and transactions, on SQLite or PostgreSQL.

Every transaction that may write starts with BEGIN IMMEDIATE: pysqlite's default begins too late
to keep a SELECT and the UPDATE that follows it together, and two workers then claim one run.
Readers use their own engine and never wait for a writer (write-ahead log). On PostgreSQL a lock
that all writers take first has the same effect.
"""

import fcntl
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, NullPool, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from studio.errors import disk_errors
from studio.store import backup, migrate, opening, probe, server
from studio.store.faults import (
    BUSY_SECONDS,
    database_errors,
    is_busy,
    is_unready,
    locked_error,
)

RESTART_SECONDS = 10.0
_LOOK_SECONDS = 0.2
_LOG_LIMIT_BYTES = 16 * 2**20


class Database:
    """What an installation remembers: the SQLite file of its home folder, or a PostgreSQL database.

    Args:
        path: The SQLite file, in the home folder. It is created and brought to the newest schema;
            of an older schema a copy is kept first.
        url: `postgresql://...`; then no file is made. Empty = SQLite.
        may_be_new: Whether an empty database may begin where an old one was lost; what lies there
            of the old one is moved aside.
        busy_seconds: How long to wait for a lock, twice.

    Attributes:
        dialect: "sqlite" or "postgresql".
        address: Where it is, for people: without a password.

    Raises:
        InputError: The URL is not understood.
        MachineError: The disk is full or read-only, the file damaged, missing or newer, the folder
            unfit for SQLite, or the server out of reach.
    """

    def __init__(
        self,
        path: Path,
        url: str = "",
        *,
        may_be_new: bool = False,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        self.path = path
        self.url = url
        self._busy_seconds = busy_seconds
        if url:
            parsed = server.parse_url(url)
            self.dialect, self.address = "postgresql", server.address_of(parsed)
            engine = server.connect(parsed, busy_seconds)
            self._writer: Engine = _lining_up(engine)
            # One state for the whole block, as SQLite's readers have it.
            self._reader: Engine = engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            self._prepare_server(may_be_new)
        else:
            self.dialect, self.address = "sqlite", str(path)
            self._writer = _engine(path, "BEGIN IMMEDIATE", busy_seconds)
            self._reader = _engine(path, "BEGIN", busy_seconds)
            event.listen(self._reader, "connect", _only_read)
            self._prepare_file(may_be_new)

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a transaction that may write; it commits when the block ends without an error.

        There is one at a time, of all processes: what a block has read stays true until it ends.
        SQLite knows it no other way. On PostgreSQL each takes one advisory lock first, so that
        the same code is right on both; the studio writes little, and short.

        Raises:
            MachineError: The disk is full or read-only, the database locked or out of reach.
        """
        with self._errors(), self._begin(self._writer) as session:
            yield session
            session.commit()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a transaction that only reads, all of it from one state of the database.

        Keep it short: as long as it is open, the write-ahead log cannot be emptied.

        Raises:
            MachineError: The database cannot be opened or reached.
        """
        with self._errors(), self._begin(self._reader) as session:
            yield session
            # Rows leave the session whole: what was loaded stays usable, nothing is written.
            session.expunge_all()

    def close(self) -> None:
        """Close all connections."""
        self._writer.dispose()
        self._reader.dispose()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with database_errors(self.path, self.address if self.url else ""):
            yield

    def _begin(self, engine: Engine) -> Session:
        """Return a session whose transaction has begun.

        Nothing of the caller has run yet, so that a lock that did not come free is tried once
        more, and a server that is just restarting is waited for.
        """
        patience, is_second = time.monotonic() + RESTART_SECONDS, False
        while True:
            session = Session(engine, expire_on_commit=False)
            try:
                session.connection()
            except DBAPIError as error:
                session.close()
                if is_busy(error):
                    if is_second:
                        raise locked_error(self.address, self._busy_seconds) from error
                    is_second = True
                elif is_unready(error) and time.monotonic() < patience:
                    time.sleep(_LOOK_SECONDS)
                else:
                    raise
            else:
                return session

    def _prepare_file(self, may_be_new: bool) -> None:
        opening.refuse_read_only(self.path)
        probe.refuse_unfit(self.path.parent, probe.find_mount(self.path.parent))
        lock = self.path.with_suffix(".lock")
        with self._errors(), disk_errors("opening the database"), lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            opening.refuse_unsound(self.path, may_be_new=may_be_new)
            opening.use_write_ahead_log(self.path)
            migrate.upgrade(
                self._writer,
                self._reader,
                str(self.path),
                when_empty=lambda: None,
                keep=lambda reason: backup.copy_file(self.path, reason),
            )

    def _prepare_server(self, may_be_new: bool) -> None:
        with self._errors(), ExitStack() as on_failure:
            on_failure.callback(self.close)
            with self._begin(self._reader) as session:
                server.refuse_unfit(session.connection(), self.address)
            migrate.upgrade(
                self._writer,
                self._reader,
                self.address,
                when_empty=lambda: opening.refuse_empty(
                    self.path, may_be_new=may_be_new, where=self.address
                ),
                keep=lambda _: None,
            )
            on_failure.pop_all()


def _engine(path: Path, begin: str, busy_seconds: float) -> Engine:
    # A file that has vanished is missed, not made anew; SQLAlchemy's BEGIN below is the only one.
    uri = f"{path.resolve().as_uri()}?mode=rw"
    engine = create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(
            uri, uri=True, timeout=busy_seconds, isolation_level=None, check_same_thread=False
        ),
        poolclass=NullPool,
        hide_parameters=True,  # errors end in logs; the values are people's texts and tokens
    )

    def connect(connection: Any, _: object) -> None:
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=FULL")  # a state change survives a power cut
        # The log is emptied every 1,000 pages (SQLite's default) by whoever writes them; what a
        # long reader made it grow to goes back to the disk.
        connection.execute(f"PRAGMA journal_size_limit={_LOG_LIMIT_BYTES}")

    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", start)
    return engine


def _only_read(connection: Any, _: object) -> None:
    connection.execute("PRAGMA query_only=ON")


def _lining_up(engine: Engine) -> Engine:
    writer = engine.execution_options()
    event.listen(writer, "begin", server.line_up)
    return writer
