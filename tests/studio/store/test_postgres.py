"""PostgreSQL in the place of SQLite: the same answers, its restarts, no password (B15)."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pydantic import ValidationError
from sqlalchemy import text

from studio.disk import Home
from studio.doctor_store import examine_store
from studio.domain.metrics import Point
from studio.errors import ConflictError, InputError, MachineError
from studio.settings import Settings
from studio.store import backup, datasets, runs
from studio.store.database import Database
from studio.store.rows import DatasetRow, RunRow
from tests.servers import PostgresServer, postgres_server

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def database(postgres: PostgresServer, tmp_path: Path) -> Iterator[Database]:
    name = f"p_{tmp_path.name.lower()}"[:60]
    made = Database(tmp_path / "studio.db", postgres.create_database(name))
    yield made
    made.close()
    postgres.drop_database(name)


def add_dataset(database: Database, name: str = "d", size_bytes: int = 1) -> None:
    with database.write() as session:
        session.add(
            DatasetRow(
                name=name,
                sha256=name,
                source_name=name,
                num_conversations=1,
                size_bytes=size_bytes,
                report={},
                created_at=1.0,
            )
        )


def names(database: Database) -> set[str]:
    with database.read() as session:
        return datasets.names(session)


def test_no_file_is_made_beside_it(database: Database, tmp_path: Path) -> None:
    assert database.dialect == "postgresql"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".db"] == []


def test_files_of_more_than_two_gibibytes_have_a_size(database: Database) -> None:
    add_dataset(database, size_bytes=5 * 2**40)
    with database.read() as session:
        assert [row.size_bytes for row in datasets.listing(session)] == [5 * 2**40]
        assert datasets.find(session, "99999999999") is None


def test_edits_and_points_are_replaced_as_on_sqlite(database: Database) -> None:
    add_dataset(database)
    with database.write() as session:
        datasets.put_edits(session, 1, range(5), {"excluded": True, "tags": ["a"]}, 1.0)
        datasets.put_edits(session, 1, [1, 2], {"excluded": False}, 2.0)
        datasets.put_edits(session, 1, [2], {"tags": None}, 3.0)
        session.add(RunRow(name="r", preset="", dataset_id=1, spec={}, created_at=1.0))
        session.flush()
        runs.add_points(session, 1, [Point(step=1, name="loss", value=3.0)])
        runs.add_points(session, 1, [Point(step=1, name="loss", value=2.0)])
    with database.read() as session:
        waiting = datasets.waiting(session, 1)
        assert waiting.excluded == {0, 3, 4}
        assert waiting.changed.keys() == {1}
        assert [p.value for p in runs.curve(session, 1, "loss")] == [2.0]


def test_writers_come_one_after_the_other(database: Database) -> None:
    # Each reads and writes back what it has read; any two at once would lose one.
    add_dataset(database, "0")

    def count() -> None:
        for _ in range(25):
            with database.write() as session:
                row = session.get_one(DatasetRow, 1)
                seen = int(row.name)
                session.execute(text("SELECT pg_sleep(0.001)"))
                row.name = str(seen + 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(database) == {"100"}


def test_a_reader_sees_one_state_and_waits_for_nobody(database: Database) -> None:
    add_dataset(database, "a")
    with database.read() as session:
        assert datasets.names(session) == {"a"}
        add_dataset(database, "b")
        assert datasets.names(session) == {"a"}
    assert names(database) == {"a", "b"}


def test_b01_a_lock_that_does_not_come_free_is_said(database: Database) -> None:
    hasty = Database(database.path, database.url, busy_seconds=0.3)
    with database.write(), pytest.raises(MachineError, match=r"locked for more than 0\.3 s"):
        add_dataset(hasty)
    add_dataset(hasty)
    hasty.close()


def test_b04_an_empty_database_beside_runs_is_refused(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    home = Home(path=tmp_path)
    home.create()
    home.run(1).path.mkdir()
    url = postgres.create_database("b04")
    with pytest.raises(MachineError, match="b04 is empty, but 1 "):
        Database(home.database, url)
    made = Database(home.database, url, may_be_new=True)
    assert names(made) == set()
    assert not home.run(1).path.exists()
    made.close()
    postgres.drop_database("b04")


def test_b15_a_restart_between_two_transactions_is_not_seen(tmp_path: Path) -> None:
    with postgres_server(tmp_path) as server:
        database = Database(tmp_path / "studio.db", server.url)
        add_dataset(database, "before")
        server.stop()
        server.start()
        assert names(database) == {"before"}
        server.kill()
        server.start()
        add_dataset(database, "after")
        assert names(database) == {"before", "after"}
        database.close()


def test_b15_a_server_that_comes_back_within_seconds_is_waited_for(tmp_path: Path) -> None:
    with postgres_server(tmp_path) as server:
        database = Database(tmp_path / "studio.db", server.url)
        server.stop()

        def later() -> None:
            time.sleep(2)
            server.start()

        starter = threading.Thread(target=later)
        starter.start()
        add_dataset(database, "a")
        starter.join()
        assert names(database) == {"a"}
        database.close()


def test_b15_a_connection_that_is_lost_in_the_middle_is_said_and_nothing_is_half(
    database: Database,
) -> None:
    add_dataset(database, "before")
    with pytest.raises(MachineError, match=f"{database.address} cannot be reached") as caught:
        write_and_be_cut_off(database)
    assert "the studio connects again by itself" in caught.value.hint
    assert names(database) == {"before"}
    add_dataset(database, "after")


def write_and_be_cut_off(database: Database) -> None:
    with database.write() as session:
        session.add(DatasetRow(name="x", sha256="x", source_name="x", num_conversations=1,
                               size_bytes=1, report={}, created_at=1.0))  # fmt: skip
        session.flush()
        own = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        cut = Database(database.path, database.url)
        with cut.read() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": own})
        cut.close()
        session.execute(text("SELECT 1"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u:hunter2@127.0.0.1:1/x", "postgresql://u@127.0.0.1:1/x cannot be reached"),
        ("postgresql://u:hunter2@nowhere.invalid/x?sslpassword=hunter2", "cannot be reached"),
        ("postgresql://u:hunter2@127.0.0.1:1/x?colour=hunter2", "an option that is not known"),
        ("mysql://u:hunter2@127.0.0.1/x", "not understood"),
        ("postgresql://u:hunter2@127.0.0.1:port/x", "not understood"),
    ],
)
def test_a_server_that_does_not_answer_is_named_without_its_password(
    tmp_path: Path, url: str, said: str
) -> None:
    # In a process of its own: what it prints is all that a user could see.
    code = (
        "import sys; from pathlib import Path; from studio.errors import StudioError; "
        "from studio.store import database\n"
        "database.RESTART_SECONDS = 0.5\n"
        "try: database.Database(Path(sys.argv[1]), sys.argv[2])\n"
        "except StudioError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "studio.db"), url]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert said in answer.stdout, answer.stderr
    assert "Traceback" not in answer.stderr
    assert "hunter2" not in answer.stdout + answer.stderr


def test_a_database_that_is_not_there_is_said_at_once(postgres: PostgresServer) -> None:
    began = time.monotonic()
    with pytest.raises(MachineError, match='database "absent" does not exist'):
        Database(Path("studio.db"), postgres.url_of("absent"))
    assert time.monotonic() - began < 5


def test_text_that_is_not_kept_as_utf_8_is_refused(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0")
    with pytest.raises(MachineError, match="keeps its text as SQL_ASCII"):
        Database(tmp_path / "studio.db", postgres.url_of("ascii"))
    postgres.drop_database("ascii")


@pytest.mark.parametrize(
    "url", ["mysql://u:hunter2@h/d", "sqlite:///x", "postgres", "postgresql://u:hun@ter2@h/d"]
)
def test_the_setting_says_what_is_allowed_and_no_password(url: str) -> None:
    with pytest.raises(
        ValidationError, match="postgresql://USER:PASSWORD@HOST:PORT/NAME"
    ) as caught:
        Settings(database_url=url)
    assert "ter2" not in str(caught.value)
    with pytest.raises(InputError):
        Database(Path("studio.db"), "mysql://u:hunter2@h/d")


def test_the_setting_is_not_shown() -> None:
    settings = Settings(database_url="postgresql://u:hunter2@h:5432/d")
    assert "hunter2" not in repr(settings)


def test_copies_are_left_to_the_servers_own_tools(database: Database, tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match="pg_dump"):
        backup.backup(database, "by hand")
    assert backup.backup_if_due(database, Home(path=tmp_path)) is None


def test_the_doctor_says_version_address_and_schema(database: Database) -> None:
    found = {finding.name: finding for finding in examine_store(database)}
    assert found["database"].text.startswith("PostgreSQL 1")
    assert database.address in found["database"].text
    assert found["schema"].text.startswith("version 0")
