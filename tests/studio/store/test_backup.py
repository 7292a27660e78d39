"""Copies of the database: made while it is used, checked, seven kept, put back (B14)."""

import json
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from studio.__main__ import app
from studio.disk import Home
from studio.errors import ConflictError, MachineError, NotFoundError
from studio.locks import take_lock
from studio.store import backup
from studio.store.copies import Copy, file_sha256, listing, manifest_path, words
from studio.store.database import Database
from studio.store.restore import restore
from studio.store.rows import DatasetRow, RunRow


def make_home(folder: Path) -> Home:
    home = Home(path=folder)
    home.create()
    return home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


@pytest.fixture
def database(home: Home) -> Database:
    made = Database(home.database)
    with made.write() as session:
        session.add(
            DatasetRow(
                name="d",
                sha256="d",
                source_name="d",
                num_conversations=1,
                size_bytes=1,
                report={},
                created_at=1.0,
            )
        )
    return made


def add_run(database: Database, state: str = "FINISHED") -> int:
    with database.write() as session:
        row = RunRow(name="r", preset="", dataset_id=1, spec={}, created_at=1.0, state=state)
        session.add(row)
    return row.id


def run_ids(database: Database) -> list[int]:
    with database.read() as session:
        return [row.id for row in session.query(RunRow).order_by(RunRow.id)]


def test_b14_a_copy_made_while_others_write_is_whole(database: Database, home: Home) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with database.write() as session:
                session.add_all(
                    RunRow(name="r", preset="", dataset_id=1, spec={}, created_at=1.0)
                    for _ in range(10)
                )

    writer = threading.Thread(target=write)
    writer.start()
    copies = [backup.backup(database, "by hand") for _ in range(3)]
    stop.set()
    writer.join()
    for copy in copies:
        with closing(sqlite3.connect(copy.path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert connection.execute("SELECT count(*) FROM runs").fetchone()[0] % 10 == 0
    assert [copy.name for copy in listing(home.backups)] == [copy.name for copy in copies][::-1]


def test_a_copy_says_what_it_is_and_what_lies_beside_it(database: Database, home: Home) -> None:
    adapter = home.run(1).adapter
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"12345")
    copy = backup.backup(database, "by hand")
    assert copy.manifest is not None
    assert copy.manifest.sha256 == file_sha256(copy.path)
    assert copy.manifest.reason == "by hand"
    assert copy.manifest.folders == {"runs/000001/adapter": {"adapter_model.safetensors": 5}}
    assert copy.path.stat().st_mode & 0o077 == 0
    assert home.backups.stat().st_mode & 0o077 == 0


def test_the_newest_seven_are_kept(database: Database, home: Home) -> None:
    made = [backup.backup(database, str(number)) for number in range(9)]
    assert [copy.path for copy in listing(home.backups)] == [copy.path for copy in made[:1:-1]]
    assert sorted(home.backups.glob("*.json")) == sorted(manifest_path(c.path) for c in made[2:])


def test_what_a_killed_copy_left_is_cleared_away(database: Database, home: Home) -> None:
    (home.backups / ".part.db").write_bytes(b"half")
    assert listing(home.backups) == []
    copy = backup.backup(database, "by hand")
    assert [path.name for path in home.backups.glob("*.db")] == [copy.name]
    assert not (home.backups / ".part.db").exists()


def test_a_copy_is_made_once_a_day(database: Database, home: Home) -> None:
    first = backup.backup_if_due(database, home)
    assert first is not None
    assert backup.backup_if_due(database, home) is None
    assert backup.backup_if_due(database, home, now=first.made_at + 86_399) is None
    assert backup.backup_if_due(database, home, now=first.made_at + 86_401) is not None
    # Somebody put the clock back by a year.
    assert backup.backup_if_due(database, home, now=first.made_at - 365 * 86_400) is not None


def test_a_damaged_database_is_not_copied(database: Database, home: Home) -> None:
    for _ in range(100):
        add_run(database)
    database.close()
    with home.database.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\xa5" * (home.database.stat().st_size - 8 * 4096))
    with pytest.raises(MachineError, match="damaged"):
        backup.copy_file(home.database, "by hand")
    assert listing(home.backups) == []


def test_b14_a_copy_on_another_machine_shows_its_rows(database: Database, tmp_path: Path) -> None:
    add_run(database, "RUNNING")
    copy = backup.backup(database, "by hand")
    elsewhere = make_home(tmp_path / "elsewhere")
    done = restore(elsewhere, str(copy.path))
    assert (done.aside, done.num_folders) == (None, 0)
    assert run_ids(Database(elsewhere.database)) == [1]


def test_b14_what_is_replaced_is_kept_with_the_runs_that_the_copy_does_not_know(
    database: Database, home: Home
) -> None:
    home.run(add_run(database)).path.mkdir()
    copy = backup.backup(database, "by hand")
    home.run(add_run(database)).checkpoint(100).mkdir(parents=True)
    done = restore(home, copy.name)
    assert done.num_folders == 1
    again = Database(home.database)
    assert run_ids(again) == [1]
    assert home.run(1).path.is_dir()
    assert add_run(again) == 2
    assert not home.run(2).path.exists()  # the new run 2 finds no checkpoint of the old one
    assert done.aside is not None
    assert (done.aside / "runs" / "000002" / "checkpoints" / "step-000100").is_dir()
    with closing(sqlite3.connect(done.aside / "studio.db")) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (2,)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"none" * 9_000), Path.unlink])
def test_b03_a_copy_takes_the_place_of_a_database_that_is_damaged_or_gone(
    database: Database, home: Home, damage: Callable[[Path], object]
) -> None:
    home.run(add_run(database)).path.mkdir()
    copy = backup.backup(database, "by hand")
    database.close()
    damage(home.database)
    with pytest.raises(MachineError):
        Database(home.database)
    restore(home, copy.name)
    assert run_ids(Database(home.database)) == [1]


@pytest.mark.parametrize("lock", ["client_lock", "worker_lock", "worker"])
def test_nothing_is_replaced_under_a_page_or_a_worker(
    database: Database, home: Home, lock: str
) -> None:
    copy = backup.backup(database, "by hand")
    path = home.worker("w") if lock == "worker" else getattr(home, lock)
    held = take_lock(path, shared=lock == "client_lock")
    assert held is not None
    with held, pytest.raises(ConflictError, match=r"(worker|page).* is open"):
        restore(home, copy.name)
    assert not (home.path / "aside").exists()


def test_nothing_is_replaced_under_another_process(database: Database, home: Home) -> None:
    copy = backup.backup(database, "by hand")
    with closing(sqlite3.connect(home.database)) as other:
        other.execute("SELECT count(*) FROM runs").fetchone()
        with pytest.raises(ConflictError, match="Another process"):
            restore(home, copy.name)


def test_a_copy_that_was_changed_is_refused(database: Database, home: Home) -> None:
    copy = backup.backup(database, "by hand")
    content = bytearray(copy.path.read_bytes())
    content[-1] ^= 1
    copy.path.write_bytes(content)
    with pytest.raises(MachineError, match="its bytes are not those that were written"):
        restore(home, copy.name)


def test_a_copy_of_a_newer_studio_is_refused(database: Database, home: Home) -> None:
    copy = backup.backup(database, "by hand")
    manifest_path(copy.path).unlink()
    with closing(sqlite3.connect(copy.path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    with pytest.raises(MachineError, match=r"newer Delta Studio.* 9999"):
        restore(home, copy.name)


def test_an_unknown_name_is_answered_with_those_that_are_there(
    database: Database, home: Home
) -> None:
    with pytest.raises(NotFoundError, match=f"none in {home.backups}"):
        restore(home, "x")
    copy = backup.backup(database, "by hand")
    with pytest.raises(NotFoundError, match=copy.name):
        restore(home, "")


def test_the_age_of_a_copy_is_said_in_words() -> None:
    copy = Copy(path=Path("a.db"), made_at=0.0, manifest=None)
    said = [words(copy, now=hours * 3600) for hours in (0.5, 3, 72)]
    assert said == ["a.db (less than an hour old)", "a.db (3 hours old)", "a.db (3 days old)"]


def test_the_command_line_copies_and_puts_back(database: Database, home: Home) -> None:
    add_run(database)
    where = ["--home", str(home.path)]
    made = json.loads(CliRunner().invoke(app, ["backup", "--json", *where]).stdout)
    add_run(database)
    answer = CliRunner().invoke(app, ["restore", Path(made["path"]).name, *where])
    assert answer.exit_code == 0, answer.output
    assert run_ids(Database(home.database)) == [1]
    assert isinstance(CliRunner().invoke(app, ["restore", "x", *where]).exception, NotFoundError)


def test_the_command_line_begins_anew_only_where_it_is_told_to(
    database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.run(add_run(database)).path.mkdir()
    database.close()
    home.database.unlink()
    where = ["--home", str(home.path)]
    refused = CliRunner().invoke(app, ["runs", *where]).exception
    assert isinstance(refused, MachineError)
    assert "STUDIO_NEW_DATABASE=1" in refused.hint
    monkeypatch.setenv("STUDIO_NEW_DATABASE", "1")
    assert CliRunner().invoke(app, ["runs", *where]).exit_code == 0


def test_of_postgresql_the_user_is_told_of_pg_dump(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_DATABASE_URL", "postgresql://u:hunter2@127.0.0.1:1/x")
    answer = CliRunner().invoke(app, ["restore", "a", "--home", str(home.path)])
    assert isinstance(answer.exception, ConflictError)
    assert "pg_dump" in answer.exception.hint
    assert "hunter2" not in str(answer.exception)
