"""Every version of the schema, up and down on both databases; what happens at a start (B06 to B08)."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from studio.errors import MachineError
from studio.store import migrate
from studio.store.copies import listing
from studio.store.database import Database
from studio.store.rows import Base
from tests.servers import PostgresServer

ROOT = Path(__file__).resolve().parents[3]
REVISIONS = migrate.known_revisions()
VERSIONS = "alembic_version"
Opener = Callable[[], Database]


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Open one empty database, of SQLite or of PostgreSQL, again and again."""
    made: list[Database] = []
    url, name = "", f"m_{tmp_path.name.lower()}"[:60]
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.create_database(name)

    def opener() -> Database:
        made.append(Database(tmp_path / "studio.db", url))
        return made[-1]

    yield opener
    for database in made:
        database.close()
    if url:
        server.drop_database(name)


def move(database: Database, revision: str) -> None:
    with database.write() as session:
        connection = session.connection()
        migrate.move(connection, revision)
        migrate.refuse_loose_ends(connection)


def tables(database: Database) -> dict[str, int]:
    """Return the number of rows of each table that is there."""
    with database.read() as session:
        connection = session.connection()
        found = set(sa.inspect(connection).get_table_names()) - {VERSIONS}
        return {
            name: connection.execute(sa.text(f"SELECT count(*) FROM {name}")).scalar_one()
            for name in found
        }


def value_of(column: sa.Column[object]) -> object:
    if column.name == "state":
        return "FINISHED"
    kind = column.type.as_generic()
    if isinstance(kind, sa.JSON):
        return {"train": {"num_gpus": 2}} if column.name == "spec" else {}
    if isinstance(kind, sa.Boolean):
        return True
    return "text" if isinstance(kind, sa.String) else 1


def fill(database: Database) -> None:
    """Add a row to each table that has none, whatever its columns are."""
    with database.write() as session:
        connection = session.connection()
        metadata = sa.MetaData()
        metadata.reflect(connection)
        for table in metadata.sorted_tables:
            if table.name == VERSIONS or connection.execute(sa.select(table)).first():
                continue
            values = {column.name: value_of(column) for column in table.columns}
            connection.execute(sa.insert(table).values(values))


@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning")
def test_rows_survive_each_step_down_and_up(opened: Opener) -> None:
    database = opened()
    fill(database)
    assert set(tables(database).values()) == {1}
    there = []
    for revision in [*reversed(REVISIONS[:-1]), "base"]:
        move(database, revision)
        there.append(tables(database))
        assert set(there[-1].values()) <= {1}
    assert there[-1] == {}
    for revision in REVISIONS:
        move(database, revision)
        fill(database)  # the next step meets a row in each table that this one has made
        assert set(tables(database).values()) == {1}
    assert tables(database).keys() == Base.metadata.tables.keys()
    # Not only at once: each version goes back to the beginning and on to the end.
    for revision in REVISIONS:
        move(database, revision)
        move(database, "base")
        move(database, REVISIONS[-1])


def test_the_migrations_make_what_the_rows_describe(opened: Opener) -> None:
    with opened().read() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_b06_an_older_database_is_kept_before_it_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "studio.db"
    database = Database(path)
    move(database, REVISIONS[0])
    add_dataset(database)
    Database(path)
    (copy,) = listing(tmp_path / "backups")
    assert copy.manifest is not None
    assert copy.manifest.revision == REVISIONS[0]
    assert copy.manifest.reason == f"before schema {REVISIONS[-1]}"
    with closing(sqlite3.connect(copy.path)) as connection:
        assert connection.execute("SELECT name FROM datasets").fetchall() == [("old",)]
    Database(path)
    assert len(listing(tmp_path / "backups")) == 1


def add_dataset(database: Database) -> None:
    """Add a Dataset to a database of the first schema."""
    with database.write() as session:
        session.connection().exec_driver_sql(
            "INSERT INTO datasets (name, sha256, source_name, num_conversations, size_bytes, "
            "report, created_at) VALUES ('old', 'a', 'a.jsonl', 1, 1, '{}', 1.0)"
        )


KILLED = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from studio.store.database import Database

left = int(sys.argv[3])

@event.listens_for(Engine, "after_cursor_execute")
def count(connection, cursor, statement, *_):
    global left
    if not statement.startswith(("PRAGMA", "SELECT", "BEGIN")):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

Database(Path(sys.argv[1]), sys.argv[2])
"""


def open_and_kill(database: Database, statements: int) -> int:
    """Open a database in a process that is killed right behind that many statements."""
    command = [sys.executable, "-c", KILLED, str(database.path), database.url, str(statements)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


@pytest.mark.parametrize("statements", [1, 4, 9, 16, 25])
def test_b06_a_migration_that_is_killed_is_made_by_the_next_start(
    opened: Opener, statements: int
) -> None:
    database = opened()
    move(database, REVISIONS[0])
    add_dataset(database)
    before = tables(database)
    assert open_and_kill(database, statements) == -signal.SIGKILL
    with database.read() as session:
        assert migrate.present_revision(session.connection()) == REVISIONS[0]
    assert tables(database) == before
    again = opened()
    with again.read() as session:
        assert migrate.present_revision(session.connection()) == REVISIONS[-1]
    assert tables(again)["datasets"] == 1


def test_b06_a_first_start_that_is_killed_is_made_by_the_next(opened: Opener) -> None:
    database = opened()
    move(database, "base")
    assert open_and_kill(database, 3) == -signal.SIGKILL
    assert tables(opened()).keys() == Base.metadata.tables.keys()


def test_b07_a_newer_database_is_refused_by_both_names(opened: Opener) -> None:
    with opened().write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(MachineError, match=rf"schema 9999\); .* up to {REVISIONS[-1]}\."):
        opened()


def test_b08_processes_that_start_at_once_on_an_empty_home_all_start(opened: Opener) -> None:
    database = opened()
    code = (
        "import sys; from pathlib import Path; from studio.store.database import Database; "
        "Database(Path(sys.argv[1]), sys.argv[2]).close()"
    )
    move(database, "base")
    if not database.url:
        for file in database.path.parent.glob("studio.db*"):
            file.unlink()
    command = [sys.executable, "-c", code, str(database.path), database.url]
    starts = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [start.wait() for start in starts] == [0, 0, 0]
    assert tables(database).keys() == Base.metadata.tables.keys()
