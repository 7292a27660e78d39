"""The database: connections, transactions, migrations.

Every transaction that may write starts with BEGIN IMMEDIATE: pysqlite's default begins too late
to keep a SELECT and the UPDATE that follows it together, and two workers then claim one run.
Readers use their own engine and never wait for a writer (write-ahead log).
"""

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, NullPool, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from studio.errors import MachineError, disk_errors

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_SECONDS = 30


class Database:
    """The SQLite file of one home folder.

    Args:
        path: The file; it is created and brought to the newest schema.

    Raises:
        MachineError: The disk is full or read-only, or the file is from a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = _engine(path, "BEGIN IMMEDIATE")
        self._reader = _engine(path, "BEGIN")
        _migrate(path, self._writer)

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a transaction that may write; it commits when the block ends without an error.

        Raises:
            MachineError: The disk is full or read-only.
        """
        with _database_errors(), Session(self._writer, expire_on_commit=False) as session:
            with session.begin():
                yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a transaction that only reads.

        Raises:
            MachineError: The database cannot be opened.
        """
        with _database_errors(), Session(self._reader, expire_on_commit=False) as session:
            yield session
            # Rows leave the session whole: what was loaded stays usable, nothing is written.
            session.expunge_all()

    def close(self) -> None:
        """Close all connections."""
        self._writer.dispose()
        self._reader.dispose()


def _engine(path: Path, begin: str) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=NullPool,
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS},
    )

    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None  # SQLAlchemy's own BEGIN below is the only one
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=FULL")  # a state change survives a power cut

    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", start)
    return engine


def _migrate(path: Path, engine: Engine) -> None:
    lock = path.with_suffix(".lock")
    with _database_errors(), disk_errors("opening the database"), lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _use_write_ahead_log(path)
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        scripts = ScriptDirectory.from_config(config)
        with engine.begin() as connection:
            present = MigrationContext.configure(connection).get_current_revision()
            known = {script.revision for script in scripts.walk_revisions()}
            if present is not None and present not in known:
                raise MachineError(
                    f"The database {path} is from a newer Delta Studio (schema {present}).",
                    "Start that version, or choose another home folder with --home DIR.",
                )
            if present != scripts.get_current_head():
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


def _use_write_ahead_log(path: Path) -> None:
    # journal_mode cannot change inside a transaction, hence the raw connection.
    raw = create_engine(f"sqlite:///{path}", poolclass=NullPool).raw_connection()
    try:
        raw.cursor().execute("PRAGMA journal_mode=WAL")
    finally:
        raw.close()


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except (DatabaseError, sqlite3.DatabaseError) as error:
        text = str(error.orig if isinstance(error, DatabaseError) else error)
        if "full" in text:
            raise MachineError(
                "The disk is full: the database could not be written.",
                "Free some space and try again; nothing that was stored is lost.",
            ) from error
        if "readonly" in text or "unable to open" in text:
            raise MachineError(
                "The database cannot be opened: its folder is read-only or missing.",
                "Choose a writable home folder with --home DIR.",
            ) from error
        if "not a database" in text or "malformed" in text:
            raise MachineError(
                f"The database is damaged ({text}).",
                "Put a backup of studio.db in its place, or choose another home folder with "
                "--home DIR; runs, datasets and merges lie beside it untouched.",
            ) from error
        raise
