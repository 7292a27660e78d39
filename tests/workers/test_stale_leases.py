"""A worker that stood still for longer than its Lease, and those who look at it meanwhile."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.disk import RunFolder
from studio.domain.placement import Placement
from studio.domain.run import RunState
from studio.locks import take_lock
from studio.store import leases
from studio.store.clock import lease_now
from studio.store.rows import RunRow
from tests.fakes import FakeDispatch
from tests.rows import NO_DATASET, add_run, claim, get_run, make_owner, make_shop, put_back
from workers import launcher, reconcile, training
from workers.app import Shop
from workers.reconcile import Reconciler
from workers.slots import Taken
from workers.supervise import LeaseLostError

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    found = make_shop(tmp_path / "home")
    found.home.dataset(NO_DATASET).write_text("{}\n")
    return found


@pytest.fixture
def old(shop: Shop) -> RunRow:
    """A Run as this worker has claimed it."""
    run_id = add_run(shop.database)
    claim(shop.database, shop.owner)
    shop.home.run(run_id).path.mkdir()
    return get_run(shop.database, run_id)


@pytest.fixture
def taken(shop: Shop) -> Iterator[Taken]:
    found = shop.slots.take(Placement(fits=True), 1)
    assert found is not None
    with found:
        yield found


def take_over(shop: Shop, run: RunRow) -> leases.Lease:
    """Let another worker claim a Run, and finish it."""
    put_back(shop.database, run.id)
    lease, folder = claim(shop.database, make_owner()), shop.home.run(run.id)
    folder.owner.write_text(lease.mark)
    folder.result.write_text("{}")
    return lease


def process_of(lease: leases.Lease, folder: RunFolder) -> subprocess.Popen[bytes]:
    process = launcher.launch(SLEEP, mark=lease.mark, log=folder.log)
    while process.pid not in launcher.marked(lease.mark):
        time.sleep(0.01)
    return process


def test_who_has_lost_its_lease_before_the_start_touches_nothing(
    shop: Shop, old: RunRow, taken: Taken
) -> None:
    lease, folder = take_over(shop, old), shop.home.run(old.id)
    process = process_of(lease, folder)
    with pytest.raises(LeaseLostError):
        training.train(shop, old, taken)
    assert process.poll() is None
    launcher.kill(process, lease.mark)
    assert folder.owner.read_text() == lease.mark
    assert folder.result.exists()
    assert get_run(shop.database, old.id).owner == lease.owner


class Meanwhile(Taken):
    """Slots that become free only after another worker has taken the Run over."""

    shop: Shop
    run: RunRow

    def prove_free(self) -> None:
        """Lose the Lease."""
        take_over(self.shop, self.run)


def test_who_loses_its_lease_while_it_waits_for_a_card_starts_nothing(
    shop: Shop, old: RunRow, taken: Taken
) -> None:
    waits = Meanwhile(cards=(), folder=taken.folder, locks=[])
    waits.shop, waits.run = shop, old
    with pytest.raises(LeaseLostError):
        training.train(shop, old, waits)
    folder = shop.home.run(old.id)
    assert folder.result.exists()
    assert not folder.log.exists()
    assert not list(launcher.marked(leases.lease_of(old).mark))


def test_a_beginning_is_told_together_with_all_that_stands_in_the_file_then(
    shop: Shop, old: RunRow
) -> None:
    folder = shop.home.run(old.id)
    tails = training.Tails(folder, old.epoch)

    def measure(*steps: int) -> None:
        with folder.metrics.open("a") as file:
            for step in steps:
                file.write(json.dumps({"step": step, "total_steps": 9, "values": {"loss": 1.0}}))
                file.write("\n")

    measure(1, 2, 3)
    assert [point.step for point in tails.look().points] == [1, 2, 3]
    # Steps that were measured, and read, before the beginning was: they are told once more, as
    # everything behind the beginning is forgotten with it.
    measure(4)
    tails.look()
    began = {"at": 1.0, "epoch": old.epoch, "kind": "began", "step": 2, "text": "Goes on."}
    folder.events.write_text(json.dumps(began) + "\n")
    measure(5)
    news = tails.look()
    assert (news.begins_at, news.values["step"]) == (2, 5)
    assert [point.step for point in news.points] == [1, 2, 3, 4, 5]
    assert tails.look().points == []


def test_nobody_is_dead_because_the_database_was_locked_for_longer_than_a_lease(
    shop: Shop, old: RunRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "LEASE_SECONDS", 0.5)
    other = make_shop(shop.home.path)
    reconciler = Reconciler(other, FakeDispatch(other.database), patience_seconds=0.5)
    lock = take_lock(shop.home.worker(shop.owner))
    assert lock is not None
    with lock:
        for _ in range(8):
            reconciler.tick()  # well for longer than a Lease
            time.sleep(0.1)
        with shop.database.write() as session:
            row = session.get_one(RunRow, old.id)
            row.lease_until = lease_now(session) + 0.3
        holder = sqlite3.connect(shop.database.path, isolation_level=None, check_same_thread=False)
        holder.execute("BEGIN IMMEDIATE")
        threading.Timer(1.0, holder.rollback).start()
        reconciler.tick()  # it waits, and so does everyone who wants to renew
        assert get_run(shop.database, old.id).state == RunState.RUNNING
        deadline = time.monotonic() + 10
        while get_run(shop.database, old.id).state == RunState.RUNNING:  # nobody has renewed
            assert time.monotonic() < deadline
            reconciler.tick()
            time.sleep(0.1)
    holder.close()
