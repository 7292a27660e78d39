"""The database: claims, fencing, migrations, and what happens when the machine is not right."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from studio.domain.metrics import Point
from studio.errors import MachineError
from studio.store import datasets, migrate, runs
from studio.store.database import Database
from studio.store.rows import Base, DatasetRow, EditRow, RunRow


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "studio.db")


def add_runs(database: Database, count: int) -> None:
    with database.write() as session:
        dataset = DatasetRow(
            name="d",
            sha256="0",
            source_name="d",
            num_conversations=1,
            size_bytes=1,
            report={},
            created_at=1.0,
        )
        session.add(dataset)
        session.flush()
        for number in range(count):
            session.add(
                RunRow(name=str(number), preset="", dataset_id=dataset.id, spec={}, created_at=1.0)
            )


def test_migrations_make_the_schema_that_the_rows_describe(database: Database) -> None:
    engine = create_engine(f"sqlite:///{database.path}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def move_schema(database: Database, revision: str) -> None:
    engine = create_engine(f"sqlite:///{database.path}")
    with engine.begin() as connection:
        connection.execute(text("PRAGMA foreign_keys=ON"))
        migrate.move(connection, revision)
    engine.dispose()


def test_datasets_of_the_first_schema_know_afterwards_how_they_came(database: Database) -> None:
    add_runs(database, 2)
    with database.write() as session:
        session.add(EditRow(dataset_id=1, number=0, excluded=True, updated_at=1.0))
    move_schema(database, "0001")
    engine = create_engine(f"sqlite:///{database.path}")
    with engine.begin() as connection:
        names = {row[1] for row in connection.execute(text("PRAGMA table_info(datasets)"))}
        assert not names & {"kind", "parent_id", "source", "change"}
        connection.execute(text("UPDATE datasets SET source_name = 'a \"b\" ü.jsonl'"))
    engine.dispose()
    move_schema(database, migrate.known_revisions()[-1])
    with database.read() as session:
        row = session.get_one(DatasetRow, 1)
        assert datasets.edit(session, 1, 0) is None
        assert [run.dataset_id for run in runs.listing(session, 10)] == [1, 1]
    assert (row.kind, row.parent_id, row.change) == ("conversations", None, None)
    assert row.source == {"type": "upload", "name": 'a "b" ü.jsonl'}


def test_a_database_of_a_newer_version_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "studio.db"
    Database(path).close()
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(MachineError, match=r"newer Delta Studio \(schema 9999\)"):
        Database(path)


def test_a_file_that_is_no_database_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "studio.db"
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(MachineError, match=r"The database is damaged \(file is not a database\)"):
        Database(path)
    assert path.read_bytes().startswith(b"this is no database")


def test_many_processes_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from studio.store.database import Database; "
        "Database(Path(sys.argv[1]))"
    )
    path = str(tmp_path / "studio.db")
    starts = [subprocess.Popen([sys.executable, "-c", code, path]) for _ in range(4)]
    assert [start.wait() for start in starts] == [0, 0, 0, 0]


def test_a_point_that_is_stored_again_is_replaced(database: Database) -> None:
    add_runs(database, 1)
    with database.write() as session:
        runs.add_points(session, 1, [Point(step=1, name="loss", value=3.0)])
        runs.add_points(session, 1, [Point(step=1, name="loss", value=2.0)])
    with database.read() as session:
        assert [p.value for p in runs.curve(session, 1, "loss")] == [2.0]


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    add_runs(database, 1)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with database.write():
            inside.set()
            leave.wait(10)

    writer = threading.Thread(target=hold)
    writer.start()
    inside.wait(10)
    began = time.monotonic()
    with database.read() as session:
        assert len(runs.listing(session, 10)) == 1
    waited = time.monotonic() - began
    leave.set()
    writer.join()
    assert waited < 5  # the writer would have held it for ten seconds


def test_a_missing_folder_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises((MachineError, FileNotFoundError)):
        Database(tmp_path / "nowhere" / "studio.db")
