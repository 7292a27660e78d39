"""Holding a Lease over a real process: what is stored, who is told, who is killed."""

import math
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studio.domain.metrics import Point
from studio.domain.run import RunState
from studio.store import leases, runs
from studio.store.clock import lease_now
from studio.store.rows import RunRow
from tests.rows import add_run, claim, get_run, make_shop, put_back
from workers import launcher
from workers.app import Shop
from workers.supervise import RENEW_SECONDS, News, Work, end, supervise

SLEEP = "import time; time.sleep(600)"
# Ends with 7 when it is asked to stop; says in argv[1] that it listens.
HEEDS = (
    "import pathlib, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    "pathlib.Path(sys.argv[1]).touch()\n"
    "time.sleep(600)\n"
)
# Ends with 0 as soon as argv[1] exists.
WAITS = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)"


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return make_shop(tmp_path / "home")


@pytest.fixture
def lease(shop: Shop) -> leases.Lease:
    add_run(shop.database)
    return claim(shop.database, shop.owner)


def launch(shop: Shop, lease: leases.Lease, code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return launcher.launch(
        [sys.executable, "-c", code, *arguments], mark=lease.mark, log=shop.home.worker_log
    )


def nothing() -> News:
    return News()


def stopping(shop: Shop, lease: leases.Lease) -> bool:
    with shop.database.write() as session:
        return leases.move(session, RunRow, lease.id, RunState.STOPPING)


@pytest.mark.parametrize("code", [0, 64])
def test_the_exit_code_of_the_process_is_returned(
    shop: Shop, lease: leases.Lease, code: int
) -> None:
    process = launch(shop, lease, f"raise SystemExit({code})")
    assert supervise(shop, Work(lease=lease, process=process, look=nothing)) == code


def test_steps_and_points_are_stored_also_the_last_ones(shop: Shop, lease: leases.Lease) -> None:
    process = launch(shop, lease, "pass")
    process.wait(60)  # so that the only look is the one after its end
    point = Point(step=3, name="loss", value=1.5)
    news = News(values={"step": 3, "total_steps": 9, "stage": "training"}, points=[point])
    assert supervise(shop, Work(lease=lease, process=process, look=lambda: news)) == 0
    row = get_run(shop.database, lease.id)
    assert (row.step, row.total_steps, row.stage) == (3, 9, "training")
    with shop.database.read() as session:
        assert runs.curve(session, lease.id, "loss") == [point]


def test_the_wish_to_stop_reaches_the_process_as_a_signal_it_can_heed(
    shop: Shop, lease: leases.Lease, tmp_path: Path
) -> None:
    listens = tmp_path / "listens"
    process = launch(shop, lease, HEEDS, str(listens))

    def look() -> News:
        if listens.exists():
            stopping(shop, lease)
        return News()

    assert supervise(shop, Work(lease=lease, process=process, look=look)) == 7
    assert get_run(shop.database, lease.id).state == RunState.STOPPING


def test_a_process_whose_lease_another_worker_has_is_killed(
    shop: Shop, lease: leases.Lease
) -> None:
    process = launch(shop, lease, SLEEP)
    taken: list[leases.Lease] = []

    def look() -> News:
        if not taken:
            put_back(shop.database, lease.id)
            taken.append(claim(shop.database, "other"))
        return News(values={"step": 5}, points=[Point(step=5, name="loss", value=0.0)])

    assert supervise(shop, Work(lease=lease, process=process, look=look)) is None
    assert process.returncode == -signal.SIGKILL
    row = get_run(shop.database, lease.id)
    assert (row.owner, row.epoch, row.step) == ("other", lease.epoch + 1, 0)
    with shop.database.read() as session:
        assert runs.curve(session, lease.id, "loss") == []


def test_a_process_whose_row_is_gone_is_killed(shop: Shop, lease: leases.Lease) -> None:
    process = launch(shop, lease, SLEEP)

    def look() -> News:
        with shop.database.write() as session:
            row = session.get(RunRow, lease.id)
            if row is not None:
                session.delete(row)
        return News()

    assert supervise(shop, Work(lease=lease, process=process, look=look)) is None
    assert process.returncode == -signal.SIGKILL


def test_a_process_does_not_outlive_a_fault_of_its_supervisor(
    shop: Shop, lease: leases.Lease
) -> None:
    process = launch(shop, lease, SLEEP)

    def look() -> News:
        raise RuntimeError("a fault of the studio")

    with pytest.raises(RuntimeError):
        supervise(shop, Work(lease=lease, process=process, look=look))
    assert process.returncode == -signal.SIGKILL


def test_values_that_do_not_change_are_written_once(
    shop: Shop, lease: leases.Lease, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    process = launch(shop, lease, WAITS, str(go))
    watcher = sqlite3.connect(shop.database.path)
    versions: list[int] = []
    began = time.monotonic()

    def look() -> News:
        # SQLite's own count: it changes when another connection has committed.
        versions.append(watcher.execute("PRAGMA data_version").fetchone()[0])
        if len(versions) == 6:
            go.touch()
        return News(values={"stage": "training", "step": 4})

    assert supervise(shop, Work(lease=lease, process=process, look=look)) == 0
    watcher.close()
    renewals = math.ceil((time.monotonic() - began) / RENEW_SECONDS)
    assert len(set(versions)) <= 1 + renewals
    assert get_run(shop.database, lease.id).step == 4


def test_a_value_that_changes_back_is_stored(
    shop: Shop, lease: leases.Lease, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    process = launch(shop, lease, WAITS, str(go))
    stages: list[str] = ["loading", "training", "loading"]
    seen: list[str] = []

    def look() -> News:
        seen.append(get_run(shop.database, lease.id).stage)
        if len(stages) == 1:
            go.touch()
        return News(values={"stage": stages.pop(0) if len(stages) > 1 else stages[0]})

    assert supervise(shop, Work(lease=lease, process=process, look=look)) == 0
    assert seen[:3] == ["", "loading", "training"]
    assert get_run(shop.database, lease.id).stage == "loading"


def test_a_lease_is_renewed_while_its_process_works(shop: Shop, lease: leases.Lease) -> None:
    with shop.database.write() as session:
        row = session.get(RunRow, lease.id)
        assert row is not None
        row.lease_until = 1.0
    assert (
        supervise(shop, Work(lease=lease, process=launch(shop, lease, "pass"), look=nothing)) == 0
    )
    until = get_run(shop.database, lease.id).lease_until
    assert until is not None
    with shop.database.read() as session:
        assert until > lease_now(session)


def test_what_ended_is_recorded_once_and_only_by_its_holder(
    shop: Shop, lease: leases.Lease, caplog: pytest.LogCaptureFixture
) -> None:
    stale = leases.Lease(table=RunRow, id=lease.id, epoch=lease.epoch, owner="other")
    end(shop, stale, RunState.FAILED)
    assert get_run(shop.database, lease.id).state == RunState.RUNNING
    end(shop, lease, RunState.FINISHED, {"result": {"step": 3}})
    end(shop, lease, RunState.FAILED)
    row = get_run(shop.database, lease.id)
    assert (row.state, row.result) == (RunState.FINISHED, {"step": 3})
    assert sum("held by another worker" in entry.getMessage() for entry in caplog.records) == 2
