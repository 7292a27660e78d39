"""Faults of the SQLite file, by their numbers in the catalogue (B01 to B13): each a real one."""

import ast
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from studio.disk import Home
from studio.errors import MachineError
from studio.store import backup, opening
from studio.store.aside import files_of
from studio.store.database import Database
from studio.store.rows import DatasetRow, RunRow

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 65534


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(path=tmp_path / "home")
    made.create()
    return made


@pytest.fixture
def path(home: Home) -> Path:
    return home.database


def add(database: Database, name: str, report_bytes: int = 0) -> None:
    with database.write() as session:
        session.add(
            DatasetRow(
                name=name,
                sha256=name,
                source_name=name,
                num_conversations=1,
                size_bytes=1,
                report={"text": "x" * report_bytes},
                created_at=1.0,
            )
        )


def names(database: Database) -> set[str]:
    with database.read() as session:
        return {row.name for row in session.query(DatasetRow)}


@contextmanager
def holder(path: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold the write lock; the block begins when it does."""
    code = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); time.sleep(float(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ---- B01: locked ------------------------------------------------------------------------------


def test_b01_a_writer_waits_for_a_lock_that_comes_free(path: Path) -> None:
    database = Database(path)
    with holder(path, 2.0):
        began = time.monotonic()
        add(database, "a")
        assert 1.0 < time.monotonic() - began < 20
    assert names(database) == {"a"}


def test_b01_a_lock_that_does_not_come_free_is_said_and_loses_nothing(path: Path) -> None:
    database = Database(path, busy_seconds=0.5)
    add(database, "before")
    with holder(path, 60.0):
        began = time.monotonic()
        with pytest.raises(MachineError, match=r"has been locked for more than 0\.5 s"):
            add(database, "during")
        assert time.monotonic() - began >= 1.0  # it was tried a second time
        assert names(database) == {"before"}
    add(database, "after")
    assert names(database) == {"before", "after"}


# ---- B02: read-only ---------------------------------------------------------------------------


def open_as_nobody(path: Path) -> subprocess.CompletedProcess[str]:
    """Open a database in a process that is not root, to which rights do not apply."""
    code = (
        "import os, sys; from pathlib import Path; from studio.errors import MachineError; "
        "from studio.store.database import Database\n"
        f"os.getuid() or os.setuid({NOBODY})\n"
        "try: Database(Path(sys.argv[1]))\n"
        "except MachineError as error: print(error)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture
def reachable(tmp_path: Path) -> Iterator[Path]:
    """A home folder that everybody may walk into, which pytest's folders are not."""
    folder = Path("/tmp") if os.getuid() == 0 else tmp_path
    place = folder / f"read-only-of-a-test-{os.getpid()}"
    place.mkdir()
    place.chmod(0o755)
    yield place
    place.chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_b02_what_is_read_only_is_named_with_the_reason(reachable: Path, what: str) -> None:
    path = reachable / "studio.db"
    Database(path).close()
    path.chmod(0o444)
    if what == "file":
        reachable.chmod(0o777)
        blamed = path
    else:
        reachable.chmod(0o555)
        blamed = reachable
    answer = open_as_nobody(path)
    assert f"{blamed} is read-only (it belongs to " in answer.stdout, answer.stderr
    assert "Traceback" not in answer.stderr


def test_b02_a_file_system_that_is_mounted_read_only_is_named(path: Path) -> None:
    Database(path).close()
    with mounted(path.parent.parent / "small", "size=4m") as small:
        shutil.copy(path, small / "studio.db")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        with pytest.raises(MachineError, match=f"tmpfs, mounted read-only at {small}"):
            Database(small / "studio.db")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small file system; skip where this machine does not let us."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root and a machine that allows it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---- B03: damaged -----------------------------------------------------------------------------


def damage_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\0" * 64)


def damage_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(b"\xa5" * 8192)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


@pytest.mark.parametrize("damage", [damage_header, damage_page, truncate])
def test_b03_a_damaged_file_is_refused_and_left_as_it_is(
    path: Path, damage: Callable[[Path], None]
) -> None:
    database = Database(path)
    for number in range(50):
        add(database, str(number), report_bytes=4_000)
    copy = backup.backup(database, "by hand")
    database.close()
    damage(path)
    before = path.read_bytes()
    with pytest.raises(MachineError, match="The database is damaged") as caught:
        Database(path)
    assert f"studio restore {copy.name}" in caught.value.hint
    assert path.read_bytes() == before


def test_b03_without_a_backup_the_user_is_told_so(path: Path) -> None:
    Database(path).close()
    damage_header(path)
    with pytest.raises(MachineError) as caught:
        Database(path)
    assert f"There is no backup in {path.parent / 'backups'}" in caught.value.hint


def test_b03_a_log_that_belongs_to_a_damaged_file_is_not_written_into_it(path: Path) -> None:
    database = Database(path)
    add(database, "big", report_bytes=400_000)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("SELECT count(*) FROM datasets").fetchone()  # keeps the log open
        add(database, "in the log")
        aside = path.parent / "copy"
        aside.mkdir()
        for end in ("", "-wal"):
            shutil.copy(f"{path}{end}", aside / f"studio.db{end}")
    damage_page(aside / "studio.db")
    before = (aside / "studio.db").read_bytes()
    with pytest.raises(MachineError, match="damaged"):
        Database(aside / "studio.db")
    assert (aside / "studio.db").read_bytes() == before
    assert (aside / "studio.db-wal").stat().st_size > 0


# ---- B04: lost --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["missing", "empty", "without tables"])
def test_b04_an_empty_database_does_not_take_the_place_of_a_lost_one(home: Home, how: str) -> None:
    database = Database(home.database)
    add(database, "a")
    copy = backup.backup(database, "by hand")
    database.close()
    checkpoint = home.run(1).checkpoint(100)
    checkpoint.mkdir(parents=True)
    home.database.unlink()
    if how == "empty":
        home.database.touch()
    elif how == "without tables":
        with closing(sqlite3.connect(home.database)) as connection:
            connection.execute("PRAGMA user_version = 1")
    with pytest.raises(MachineError, match="runs, merges and chats lie in") as caught:
        Database(home.database)
    assert copy.name in caught.value.hint
    assert "--new" in caught.value.hint
    assert "STUDIO_NEW_DATABASE=1" in caught.value.hint
    assert checkpoint.is_dir()
    assert home.database.exists() is (how != "missing")

    fresh = Database(home.database, may_be_new=True)
    assert names(fresh) == set()
    # The first new run has number 1: it must not find the checkpoint of another one.
    assert not home.run(1).path.exists()
    (kept,) = (home.path / "aside").glob("*/runs/000001/checkpoints/step-000100")
    assert kept.is_dir()


def test_b04_a_new_home_folder_needs_no_permission(home: Home) -> None:
    assert names(Database(home.database)) == set()


def test_b04_a_database_that_vanishes_while_it_is_used_is_not_made_anew(path: Path) -> None:
    database = Database(path)
    add(database, "a")
    path.unlink()
    with pytest.raises(MachineError, match="cannot be opened"):
        add(database, "b")
    assert not path.exists()


# ---- B05: disk full ---------------------------------------------------------------------------


def test_b05_on_a_full_disk_nothing_is_lost_and_reading_goes_on(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=6m") as small:
        database = Database(small / "studio.db")
        add(database, "before")
        spare, ballast = small / "spare", small / "ballast"
        spare.write_bytes(b"x" * 64 * 1024)
        ballast.write_bytes(b"x" * 3 * 2**20)
        with pytest.raises(MachineError, match="The disk is full"):
            add_many(database)
        stored = names(database)
        with pytest.raises(OSError, match="No space"):
            fill(ballast)
        spare.unlink()  # who opens the database makes the log's index, of 32 KiB
        assert "before" in stored
        assert names(database) == stored
        with pytest.raises(MachineError, match="full"):
            backup.backup(database, "by hand")
        ballast.unlink()
        with database.write() as session:
            session.query(DatasetRow).filter(DatasetRow.name.like("during%")).delete()
        add(database, "after")
        assert names(database) == {"before", "after"}
        with closing(sqlite3.connect(database.path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not list((small / "backups").glob("*.db"))


def add_many(database: Database) -> None:
    for number in range(100):
        add(database, f"during {number}", report_bytes=200_000)


def fill(ballast: Path) -> None:
    with ballast.open("ab", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def test_b05_sqlite_that_says_full_is_understood(path: Path) -> None:
    # The same without a mount: SQLite's own limit ends in the same SQLITE_FULL.
    database = Database(path)
    add(database, "before")
    with pytest.raises(MachineError, match="The disk is full"):
        add_beyond_the_limit(database)
    add(database, "after")
    assert names(database) == {"before", "after"}


def add_beyond_the_limit(database: Database) -> None:
    with database.write() as session:
        pages = session.connection().exec_driver_sql("PRAGMA page_count").scalar_one()
        session.connection().exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        session.add(
            DatasetRow(
                name="b",
                sha256="b",
                source_name="b",
                num_conversations=1,
                size_bytes=1,
                report={"text": "x" * 400_000},
                created_at=1.0,
            )
        )


# ---- B09: the log's files ---------------------------------------------------------------------


def test_b09_a_log_that_was_deleted_after_a_crash_is_missed(path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; "
        "from studio.store.database import Database\n"
        "with Database(Path(sys.argv[1])).write() as session:\n"
        '    session.connection().exec_driver_sql("INSERT INTO queue VALUES (7, 0)")\n'
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    Database(path).close()
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, cwd=ROOT)
    log, index = path.with_name("studio.db-wal"), path.with_name("studio.db-shm")
    assert log.exists()
    assert index.exists()
    log.unlink()
    with pytest.raises(MachineError, match=r"log studio\.db-wal .* is missing") as caught:
        Database(path)
    assert "delete studio.db-shm" in caught.value.hint
    index.unlink()
    assert names(Database(path)) == set()


def test_b09_a_log_without_its_database_is_explained_and_kept(path: Path) -> None:
    database = Database(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("SELECT count(*) FROM datasets").fetchone()
        add(database, "a")
        log = path.with_name("studio.db-wal")
        kept = log.read_bytes()
    path.unlink()
    log.write_bytes(kept)
    with pytest.raises(MachineError, match=r"missing, but its log studio\.db-wal is there"):
        Database(path)
    assert log.read_bytes() == kept


def test_b09_a_clean_copy_without_log_and_index_is_whole(path: Path, tmp_path: Path) -> None:
    database = Database(path)
    add(database, "a")
    database.close()
    shutil.copy(path, tmp_path / "studio.db")
    assert names(Database(tmp_path / "studio.db")) == {"a"}


def test_b09_processes_that_come_and_go_do_not_look_like_a_lost_log(path: Path) -> None:
    database = Database(path)
    stop = threading.Event()

    def use() -> None:
        while not stop.is_set():
            names(database)

    users = [threading.Thread(target=use) for _ in range(3)]
    for user in users:
        user.start()
    try:
        for _ in range(100):
            opening.refuse_unsound(path, may_be_new=False)
    finally:
        stop.set()
        for user in users:
            user.join()


# ---- B12: killed writers ----------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from studio.domain.metrics import Point
from studio.store import runs
from studio.store.database import Database

database, name = Database(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
batch = 0
while True:
    with database.write() as session:
        points = [Point(step=batch * 20 + i, name=name, value=1.0) for i in range(20)]
        runs.add_points(session, 1, points)
    print(batch, flush=True)
    batch += 1
"""


def test_b12_what_was_acknowledged_to_killed_writers_is_there(path: Path, tmp_path: Path) -> None:
    database = Database(path)
    add(database, "d")
    add_run(database)
    said: dict[str, Path] = {}
    number = 0

    def start() -> subprocess.Popen[bytes]:
        nonlocal number
        number += 1
        said[f"w{number}"] = tmp_path / f"w{number}"
        with said[f"w{number}"].open("wb") as file:
            command = [sys.executable, "-c", WRITER, str(path), f"w{number}"]
            return subprocess.Popen(command, stdout=file, cwd=ROOT)

    writers = [start() for _ in range(4)]
    for turn in range(5):
        time.sleep(1.2)
        writers[turn % 4].send_signal(signal.SIGKILL)
        writers[turn % 4].wait()
        writers[turn % 4] = start()
    for writer in writers:
        writer.kill()
        writer.wait()
    total = 0
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for name, file in said.items():
            # A line that was cut is of a batch whose end nobody was told.
            acknowledged = len(file.read_bytes().splitlines(keepends=True)[1:])
            query = "SELECT count(*) FROM points WHERE name = ?"
            stored = connection.execute(query, (name,)).fetchone()[0]
            assert stored % 20 == 0
            assert acknowledged * 20 <= stored <= (acknowledged + 1) * 20
            total += stored
    assert total > 0


def add_run(database: Database) -> None:
    with database.write() as session:
        session.add(RunRow(name="r", preset="", dataset_id=1, spec={}, created_at=1.0))


# ---- B13: long readers ------------------------------------------------------------------------


def test_b13_a_reader_in_a_loop_does_not_let_the_log_grow(path: Path) -> None:
    database = Database(path)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            names(database)

    reader = threading.Thread(target=look)
    reader.start()
    largest = 0
    log = path.with_name("studio.db-wal")
    end = time.monotonic() + 4
    number = 0
    while time.monotonic() < end:
        add(database, str(number), report_bytes=50_000)
        number += 1
        with database.write() as session:
            session.query(DatasetRow).delete()
        largest = max(largest, log.stat().st_size if log.exists() else 0)
    stop.set()
    reader.join()
    assert number > 20
    assert largest < 64 * 2**20


def test_b13_nothing_waits_or_yields_while_it_holds_the_database() -> None:
    # Whoever does keeps the log from being emptied, or every writer from writing.
    guilty = []
    for file in [*(ROOT / "studio").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]:
        if file.is_relative_to(ROOT / "studio" / "store"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.With) and any(holds_database(item) for item in node.items):
                guilty += [
                    f"{file.relative_to(ROOT)}:{node.lineno}"
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.Yield | ast.YieldFrom) or is_pause(inner)
                ]
    assert guilty == []


def holds_database(item: ast.withitem) -> bool:
    call = item.context_expr
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("read", "write")
        and ast.unparse(call.func.value).endswith("database")
    )


def is_pause(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "subprocess.run")


def test_a_log_that_goes_away_while_it_is_looked_at_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite removes its log with the last connection: another process may do so at any moment."""
    path = tmp_path / "studio.db"
    Database(path).close()

    def and_one_that_is_gone(database: Path) -> list[Path]:
        return [*files_of(database), database.with_name("studio.db-wal")]

    assert not path.with_name("studio.db-wal").exists()
    monkeypatch.setattr(opening, "files_of", and_one_that_is_gone)
    opening.refuse_read_only(path)
