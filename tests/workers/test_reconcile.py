"""What a dead worker leaves is put right: rows, processes, measurements, bells."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from studio.dispatch import Bell
from studio.domain.retry import MAX_LOSSES
from studio.domain.run import RunState, Wish
from studio.locks import take_lock
from studio.settings import Settings
from studio.store import events, leases, runs, workers
from studio.store.clock import boot_id
from studio.store.database import Database
from studio.store.rows import ArtifactRow, ChatRow, RunRow
from tests.fakes import FakeDispatch
from tests.rows import add_run, claim, get_run, make_owner, make_shop, put_back
from workers import launcher, reconcile
from workers.app import Shop, open_shop
from workers.reconcile import Reconciler

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
    change(database, run_id, lease_until=0.0)


def change(database: Database, run_id: int, **values: object) -> None:
    with database.write() as session:
        row = session.get(RunRow, run_id)
        assert row is not None
        for name, value in values.items():
            setattr(row, name, value)


def tick(shop: Shop, patience_seconds: float = 0.0) -> list[Bell]:
    dispatch = FakeDispatch(shop.database)
    Reconciler(shop, dispatch, patience_seconds=patience_seconds).tick()
    return dispatch.rung


def set_state(database: Database, run_id: int, state: RunState, wish: Wish = Wish.STOP) -> None:
    with database.write() as session:
        assert leases.move(session, RunRow, run_id, state)
    change(database, run_id, wish=wish)


def write_result(shop: Shop, run_id: int, state: str) -> None:
    shop.home.run(run_id).result.write_text(json.dumps({"state": state, "step": 3}))


def lose(shop: Shop, **values: object) -> None:
    """Claim a Run for a worker that dies at once."""
    lease = claim(shop.database, make_owner())
    shop.home.worker(lease.owner).touch()
    change(shop.database, lease.id, **values)
    tick(shop)


def history(shop: Shop, run_id: int) -> list[tuple[str, str]]:
    with shop.database.read() as session:
        return [(event.kind, event.text) for event in events.of(session, RunRow, run_id)]


@contextmanager
def living_worker(shop: Shop, owner: str) -> Iterator[None]:
    """Hold the lock file of a worker, as it does while it lives."""
    lock = take_lock(shop.home.worker(owner))
    assert lock is not None
    with lock:
        yield


def marked_process(shop: Shop, mark: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = launcher.launch(command, mark=mark, log=shop.home.worker_log)
    while process.pid not in launcher.marked(mark):  # the fork has its mark once it has execed
        time.sleep(0.01)
    return process


def test_a_run_of_a_dead_worker_goes_back_into_the_queue_and_says_so(
    shop: Shop, orphan: leases.Lease
) -> None:
    assert tick(shop) == [Bell.TRAIN]
    row = get_run(shop.database, orphan.id)
    assert (row.state, row.losses, row.lease_until, row.error) == (RunState.QUEUED, 1, None, None)
    [(kind, text)] = history(shop, orphan.id)
    assert kind == "worker lost"
    assert text == f"Its worker on {row.host} was lost; it goes on from its latest checkpoint."


def test_a_run_whose_workers_are_lost_again_and_again_fails(shop: Shop) -> None:
    run_id = add_run(shop.database)
    for _ in range(MAX_LOSSES + 1):
        lose(shop)
    row = get_run(shop.database, run_id)
    assert (row.state, row.epoch) == (RunState.FAILED, MAX_LOSSES + 1)
    assert row.error is not None
    assert row.error["message"].startswith("The worker that executed this is gone, and so were")


def test_a_run_that_gets_further_each_time_is_tried_as_often_as_it_needs(shop: Shop) -> None:
    run_id = add_run(shop.database)
    for step in range(2 * MAX_LOSSES):
        lose(shop, step=step + 1)
    assert get_run(shop.database, run_id).state == RunState.QUEUED


def test_a_run_whose_worker_lives_is_left_alone_as_long_as_its_lease_holds(shop: Shop) -> None:
    run_id = add_run(shop.database)
    lease = claim(shop.database, make_owner())
    with living_worker(shop, lease.owner):
        tick(shop)
        assert get_run(shop.database, run_id).state == RunState.RUNNING
        expire(shop.database, run_id)  # it lives, and yet stands still
        tick(shop, patience_seconds=30.0)
        assert get_run(shop.database, run_id).state == RunState.RUNNING
        tick(shop)
        assert get_run(shop.database, run_id).state == RunState.QUEUED


def test_a_run_of_before_the_machine_was_started_again_goes_on_at_once(shop: Shop) -> None:
    run_id = add_run(shop.database)
    lease = claim(shop.database, make_owner())
    change(shop.database, run_id, boot_id="another-boot", lease_until=1e12)
    with living_worker(shop, lease.owner):
        tick(shop, patience_seconds=30.0)
    assert get_run(shop.database, run_id).state == RunState.QUEUED


def test_the_wall_clock_ends_no_lease(shop: Shop) -> None:
    run_id = add_run(shop.database)
    lease = claim(shop.database, make_owner())
    until = get_run(shop.database, run_id).lease_until
    assert until is not None
    # Seconds since the machine was started: nothing that a clock set to another day can change.
    assert 0 < until - time.clock_gettime(time.CLOCK_BOOTTIME) <= leases.LEASE_SECONDS
    with living_worker(shop, lease.owner):
        tick(shop)
    assert get_run(shop.database, run_id).state == RunState.RUNNING


def test_a_crash_that_nobody_had_recorded_is_tried_once_more_and_no_more(shop: Shop) -> None:
    run_id = add_run(shop.database)
    words = {"type": "RuntimeError", "message": "CUDA error.", "hint": "", "code": 1}
    shop.home.run(run_id).path.mkdir()
    for state in (RunState.QUEUED, RunState.FAILED):
        shop.home.run(run_id).error.write_text(json.dumps(words))
        lose(shop)
        assert get_run(shop.database, run_id).state == state
    assert get_run(shop.database, run_id).error == words


def test_a_pause_that_met_a_dead_worker_is_a_pause(shop: Shop, orphan: leases.Lease) -> None:
    set_state(shop.database, orphan.id, RunState.STOPPING, Wish.PAUSE)
    assert tick(shop) == []
    row = get_run(shop.database, orphan.id)
    assert (row.state, row.is_held, row.wish) == (RunState.QUEUED, True, "")


def test_a_worker_of_another_home_folder_is_believed_as_long_as_its_lease_holds(
    shop: Shop,
) -> None:
    run_id = add_run(shop.database)
    claim(shop.database, make_owner())  # no lock file of it lies here
    tick(shop)
    assert get_run(shop.database, run_id).state == RunState.RUNNING


def test_processes_of_a_lease_that_is_not_the_present_one_die(shop: Shop) -> None:
    run_id = add_run(shop.database)
    old = claim(shop.database, make_owner())
    put_back(shop.database, run_id)
    now = claim(shop.database, make_owner())
    stranger = f"runs:{run_id}:{old.epoch}:worker-of-another-home"
    with living_worker(shop, old.owner), living_worker(shop, now.owner):
        processes = [marked_process(shop, mark) for mark in (old.mark, now.mark, stranger)]
        tick(shop)
        assert processes[0].wait(60) == -signal.SIGKILL
        assert [process.poll() for process in processes[1:]] == [None, None]
    for process, mark in zip(processes[1:], (now.mark, stranger), strict=True):
        launcher.kill(process, mark)
    assert [kind for kind, _ in history(shop, run_id)] == ["left over"]


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
    assert get_run(shop.database, lease.id).state == RunState.QUEUED


def test_what_was_measured_is_kept(shop: Shop, orphan: leases.Lease) -> None:
    torn = '{"step": 4, "total'
    shop.home.run(orphan.id).metrics.write_text(METRICS + torn)
    tick(shop)
    row = get_run(shop.database, orphan.id)
    assert (row.state, row.step, row.total_steps) == (RunState.QUEUED, 3, 9)
    with shop.database.read() as session:
        assert [point.step for point in runs.curve(session, orphan.id, "loss")] == [1, 2, 3]


def test_what_the_trainer_said_of_its_own_failure_is_kept(shop: Shop, orphan: leases.Lease) -> None:
    words = {"type": "InputError", "message": "The data is wrong.", "hint": "Mend it.", "code": 64}
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


def test_a_merge_of_a_dead_worker_starts_anew_and_a_chat_ends(shop: Shop) -> None:
    run_id = add_run(shop.database)
    gone = {"state": RunState.RUNNING, "epoch": 1, "owner": "dead", "boot_id": boot_id()}
    shop.home.worker("dead").touch()
    with shop.database.write() as session:
        session.add(ChatRow(run_id=run_id, token="t", last_used_at=1.0, created_at=1.0, **gone))
        session.add(ArtifactRow(run_id=run_id, created_at=1.0, **gone))
    assert Bell.MERGE in tick(shop)
    with shop.database.read() as session:
        chat, merge = session.get_one(ChatRow, 1), session.get_one(ArtifactRow, 1)
    assert (chat.state, merge.state, merge.losses) == (RunState.FAILED, RunState.QUEUED, 1)
    assert chat.error is not None
    assert chat.error["hint"] == "Open the chat again."


def test_a_worker_says_that_it_lives(shop: Shop) -> None:
    tick(shop)
    with shop.database.read() as session:
        [row] = workers.alive(session)
    assert (row.name, row.pid, row.is_closing) == (shop.owner, os.getpid(), False)


def test_a_worker_that_starts_puts_right_at_once_what_its_forerunner_left(shop: Shop) -> None:
    run_id = add_run(shop.database)
    lease = claim(shop.database, make_owner())  # it has not run out, but nobody holds its lock
    shop.home.worker(lease.owner).touch()
    thread = reconcile.start(shop)
    deadline = time.monotonic() + 60
    while get_run(shop.database, run_id).state != RunState.QUEUED:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shop.closing.set()
    thread.join(60)
    assert not thread.is_alive()


def test_a_run_that_cannot_be_put_right_does_not_keep_the_others_from_it(shop: Shop) -> None:
    bad, good = add_run(shop.database), add_run(shop.database)
    for _ in range(2):
        shop.home.worker(claim(shop.database, make_owner()).owner).touch()
    folder = shop.home.run(bad)
    folder.path.mkdir()
    folder.result.write_text("{}")  # without a state
    tick(shop)
    assert get_run(shop.database, bad).state == RunState.RUNNING
    assert get_run(shop.database, good).state == RunState.QUEUED


def test_measurements_that_cannot_be_read_do_not_keep_a_run_from_going_on(shop: Shop) -> None:
    run_id = add_run(shop.database)
    shop.home.worker(claim(shop.database, make_owner()).owner).touch()
    shop.home.run(run_id).path.mkdir()
    shop.home.run(run_id).metrics.mkdir()  # a folder in its place
    tick(shop)
    assert get_run(shop.database, run_id).state == RunState.QUEUED


def test_what_may_not_have_got_to_the_store_of_files_is_done_again(tmp_path: Path) -> None:
    home = make_shop(tmp_path / "home").home
    settings = Settings(home=home.path, files_url=(tmp_path / "store").as_uri())
    shop = open_shop(home, settings, make_owner())
    run_id = add_run(shop.database)
    shop.home.worker(claim(shop.database, make_owner()).owner).touch()
    shop.home.run(run_id).path.mkdir()
    write_result(shop, run_id, "FINISHED")
    tick(shop)
    assert get_run(shop.database, run_id).state == RunState.QUEUED


def test_a_lease_of_a_clock_that_was_set_back_is_over(shop: Shop) -> None:
    run_id = add_run(shop.database)
    lease = claim(shop.database, make_owner())
    until = get_run(shop.database, run_id).lease_until
    assert until is not None
    change(shop.database, run_id, lease_until=until + 3600)
    with living_worker(shop, lease.owner):
        tick(shop)
    assert get_run(shop.database, run_id).state == RunState.QUEUED
