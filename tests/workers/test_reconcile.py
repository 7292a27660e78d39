"""What a dead worker leaves is put right: rows, processes, measurements, bells."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studio.dispatch import Bell
from studio.domain.run import RunState
from studio.store import leases, runs
from studio.store.database import Database
from studio.store.rows import ArtifactRow, ChatRow, RunRow
from tests.fakes import FakeDispatch
from tests.rows import add_run, claim, get_run, make_owner, make_shop
from workers import launcher, reconcile
from workers.app import Shop

METRICS = "".join(
    json.dumps({"step": step, "total_steps": 9, "values": {"loss": 1.0 / step}}) + "\n"
    for step in (1, 2, 3)
)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return make_shop(tmp_path / "home")


@pytest.fixture
def orphan(shop: Shop) -> leases.Lease:
    """A Run whose worker is gone and whose Lease ran out."""
    run_id = add_run(shop.database)
    lease = claim(shop.database, make_owner())
    shop.home.run(run_id).path.mkdir()
    expire(shop.database, run_id)
    return lease


def expire(database: Database, run_id: int) -> None:
    with database.write() as session:
        row = session.get(RunRow, run_id)
        assert row is not None
        row.lease_until = time.time() - 1


def tick(shop: Shop) -> list[Bell]:
    dispatch = FakeDispatch(shop.database)
    reconcile.tick(shop, dispatch)
    return dispatch.rung


def set_state(database: Database, run_id: int, state: RunState) -> None:
    with database.write() as session:
        assert leases.move(session, RunRow, run_id, state, now=time.time())


def write_result(shop: Shop, run_id: int, state: str) -> None:
    shop.home.run(run_id).result.write_text(json.dumps({"state": state, "step": 3}))


def marked_process(shop: Shop, mark: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = launcher.launch(command, mark=mark, log=shop.home.worker_log)
    while process.pid not in launcher.marked(mark):  # the fork has its mark once it has execed
        time.sleep(0.01)
    return process


def test_a_run_of_a_dead_worker_fails_in_words(shop: Shop, orphan: leases.Lease) -> None:
    tick(shop)
    row = get_run(shop.database, orphan.id)
    assert row.state == RunState.FAILED
    assert row.error is not None
    assert row.error["message"] == "The worker that executed this is gone, so the work was ended."
    assert "Launch it again" in row.error["hint"]
    assert row.finished_at is not None


def test_a_run_whose_lease_holds_is_left_alone(shop: Shop) -> None:
    run_id = add_run(shop.database)
    claim(shop.database, make_owner())
    tick(shop)
    assert get_run(shop.database, run_id).state == RunState.RUNNING


def test_processes_of_a_dead_worker_die(shop: Shop, orphan: leases.Lease) -> None:
    process = marked_process(shop, orphan.mark)
    tick(shop)
    assert process.wait(60) == -signal.SIGKILL


def test_a_worker_does_not_end_its_own_run_after_the_machine_has_slept(shop: Shop) -> None:
    add_run(shop.database)
    lease = claim(shop.database, shop.owner)
    process = marked_process(shop, lease.mark)
    expire(shop.database, lease.id)
    tick(shop)
    assert get_run(shop.database, lease.id).state == RunState.RUNNING
    assert process.poll() is None
    launcher.kill(process, lease.mark)
    tick(shop)  # nothing works under the Lease any more, so nobody will renew it
    assert get_run(shop.database, lease.id).state == RunState.FAILED


def test_what_was_measured_is_kept(shop: Shop, orphan: leases.Lease) -> None:
    torn = '{"step": 4, "total'
    shop.home.run(orphan.id).metrics.write_text(METRICS + torn)
    tick(shop)
    row = get_run(shop.database, orphan.id)
    assert (row.state, row.step, row.total_steps) == (RunState.FAILED, 3, 9)
    with shop.database.read() as session:
        assert [point.step for point in runs.curve(session, orphan.id, "loss")] == [1, 2, 3]


def test_what_the_trainer_said_of_its_own_failure_is_kept(shop: Shop, orphan: leases.Lease) -> None:
    words = {"type": "InputError", "message": "The data is wrong.", "hint": "Mend it."}
    shop.home.run(orphan.id).error.write_text(json.dumps(words))
    tick(shop)
    assert get_run(shop.database, orphan.id).error == words


def test_a_run_that_was_stopping_is_stopped(shop: Shop, orphan: leases.Lease) -> None:
    set_state(shop.database, orphan.id, RunState.STOPPING)
    tick(shop)
    row = get_run(shop.database, orphan.id)
    assert (row.state, row.error) == (RunState.STOPPED, None)


@pytest.mark.parametrize(
    ("was", "result", "becomes"),
    [
        (RunState.RUNNING, "FINISHED", RunState.FINISHED),
        (RunState.STOPPING, "FINISHED", RunState.FINISHED),
        (RunState.STOPPING, "STOPPED", RunState.STOPPED),
    ],
)
def test_a_run_that_had_ended_by_itself_ends_as_it_said(
    shop: Shop, orphan: leases.Lease, was: RunState, result: str, becomes: RunState
) -> None:
    if was is RunState.STOPPING:
        set_state(shop.database, orphan.id, was)
    write_result(shop, orphan.id, result)
    tick(shop)
    row = get_run(shop.database, orphan.id)
    assert (row.state, row.error) == (becomes, None)
    assert row.result == {"state": result, "step": 3}


def test_queued_rows_are_rung_for_again_each_by_its_own_bell(shop: Shop) -> None:
    assert tick(shop) == []
    run_id = add_run(shop.database)
    with shop.database.write() as session:
        session.add(ChatRow(run_id=run_id, token="t", last_used_at=1.0, created_at=1.0))
        session.add(ArtifactRow(run_id=run_id, created_at=1.0))
    assert tick(shop) == [Bell.TRAIN, Bell.MERGE, Bell.SERVE]


def test_merges_and_chats_of_a_dead_worker_fail_too(shop: Shop) -> None:
    run_id = add_run(shop.database)
    claim(shop.database, shop.owner)
    gone = {"state": RunState.RUNNING, "epoch": 1, "owner": "dead", "lease_until": 1.0}
    with shop.database.write() as session:
        session.add(ChatRow(run_id=run_id, token="t", last_used_at=1.0, created_at=1.0, **gone))
        session.add(ArtifactRow(run_id=run_id, created_at=1.0, **gone))
    tick(shop)
    with shop.database.read() as session:
        states = [session.get(table, 1) for table in (ChatRow, ArtifactRow)]
    assert [row.state for row in states if row is not None] == [RunState.FAILED] * 2


def test_a_worker_that_starts_ends_the_runs_of_its_forerunner_at_once(shop: Shop) -> None:
    run_id = add_run(shop.database)
    claim(shop.database, make_owner())  # its Lease has not run out, but the worker lock is ours now
    thread = reconcile.start(shop)
    shop.closing.set()
    thread.join(60)
    assert not thread.is_alive()
    assert get_run(shop.database, run_id).state == RunState.FAILED
