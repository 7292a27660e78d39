"""Claims, Leases and the order of the queue, on SQLite and on PostgreSQL."""

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from studio.domain.metrics import Point
from studio.domain.placement import Card, Need, Placement, place
from studio.domain.retry import Attempts
from studio.domain.run import RunState, Wish
from studio.store import events, leases, queue, runs, workers
from studio.store.clock import boot_id, holder, lease_now
from studio.store.database import Database
from studio.store.rows import ArtifactRow, RunRow, WorkerRow
from tests.rows import add_run, anywhere, claim, get_run, put_back

BOTH = ("sqlite", "postgresql")


@pytest.fixture(params=BOTH)
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    """A database of each kind, without rows."""
    path: Path = tmp_path_factory.mktemp("database") / "studio.db"
    if request.param == "sqlite":
        database = Database(path)
        yield database
        database.close()
        return
    server = request.getfixturevalue("postgres")
    name = f"leases_{uuid.uuid4().hex}"
    database = Database(path, server.create_database(name))
    yield database
    database.close()
    server.drop_database(name)


def add(database: Database, count: int = 1, **values: object) -> list[int]:
    """Queue some Runs with columns set."""
    added = [add_run(database) for _ in range(count)]
    with database.write() as session:
        for run_id in added:
            row = session.get_one(RunRow, run_id)
            for name, value in values.items():
                setattr(row, name, value)
    return added


def order(database: Database) -> list[int]:
    with database.read() as session:
        return [row.id for row in queue.ready(session)]


def test_each_run_is_claimed_once_by_competing_workers(database: Database) -> None:
    added = add(database, 40)
    claimed: list[int] = []

    def work(owner: str) -> None:
        while True:
            with database.write() as session:
                found = queue.claim(session, holder(owner), anywhere)
            if found is None:
                return
            claimed.append(found[0].id)

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == added


def test_a_stale_lease_writes_nothing(database: Database) -> None:
    [run_id] = add(database)
    stale = claim(database, "a")
    put_back(database, run_id)
    second = claim(database, "b")
    assert second.epoch == stale.epoch + 1
    with database.write() as session:
        assert leases.renew(session, stale, {"step": 7}) is None
        assert not leases.finish(session, stale, RunState.FINISHED, {})
        assert not leases.requeue(session, stale)
    row = get_run(database, run_id)
    assert (row.state, row.step, row.owner) == (RunState.RUNNING, 0, "b")


def test_only_allowed_moves_are_made(database: Database) -> None:
    [run_id] = add(database)
    with database.write() as session:
        assert not leases.move(session, RunRow, run_id, RunState.STOPPING)
        assert leases.move(session, RunRow, run_id, RunState.STOPPED)
        assert not leases.move(session, RunRow, run_id, RunState.STOPPED)


def test_what_a_worker_holds_is_not_put_back_by_a_move(database: Database) -> None:
    [run_id] = add(database)
    claim(database, "a")
    with database.write() as session:
        assert not leases.move(session, RunRow, run_id, RunState.QUEUED)


def test_a_finished_run_cannot_end_again(database: Database) -> None:
    [run_id] = add(database)
    lease = claim(database, "a")
    with database.write() as session:
        assert leases.finish(session, lease, RunState.FINISHED, {})
    with database.write() as session:
        assert not leases.finish(session, lease, RunState.FAILED, {})
        assert not leases.requeue(session, lease)
        assert not leases.move(session, RunRow, run_id, RunState.QUEUED)


def test_of_a_stop_and_an_end_at_the_same_moment_exactly_one_wins(database: Database) -> None:
    """A user's stop races with the worker's end: whatever comes first, one end is recorded."""
    ends: list[RunState] = []
    for _ in range(25):
        [run_id] = add(database)
        lease = claim(database, "a")
        gate = threading.Barrier(2)
        done: list[bool] = []

        def stop(run_id: int = run_id, gate: threading.Barrier = gate) -> None:
            gate.wait()
            with database.write() as session:
                leases.move(session, RunRow, run_id, RunState.STOPPING)

        thread = threading.Thread(target=stop)
        thread.start()
        gate.wait()
        for state in (RunState.FINISHED, RunState.STOPPED):
            with database.write() as session:
                done.append(leases.finish(session, lease, state, {}))
        thread.join()
        assert sum(done) == 1
        ends.append(RunState(get_run(database, run_id).state))
    assert set(ends) == {RunState.FINISHED}


def test_a_requeued_run_keeps_its_place_and_how_often_it_was_tried(database: Database) -> None:
    first, second = add(database, 2)
    lease = claim(database, "a")
    with database.write() as session:
        attempts = Attempts(crashes=1, furthest=7)
        assert leases.requeue(session, lease, attempts=attempts, is_held=True)
    assert order(database) == [second]
    row = get_run(database, first)
    assert (row.is_held, row.crashes, row.furthest, row.gpus) == (True, 1, 7, None)
    with database.write() as session:
        session.get_one(RunRow, first).is_held = False
    assert order(database) == [first, second]


def test_leases_end_by_the_clock_of_leases_or_with_the_machine(database: Database) -> None:
    add(database, 3)
    held = [claim(database, f"w{number}") for number in range(3)]
    with database.write() as session:
        session.get_one(RunRow, held[1].id).lease_until = lease_now(session) - 1
        session.get_one(RunRow, held[2].id).boot_id = "another"
    with database.read() as session:
        over = {row.id for row in leases.expired(session, RunRow, boot_id())}
    of_another_machine = {held[2].id} if database.dialect == "sqlite" else set()
    assert over == {held[1].id} | of_another_machine


# ---- order ------------------------------------------------------------------------------------


def test_the_higher_priority_starts_first_then_who_came_first(database: Database) -> None:
    a, b, c = add(database, 3)
    with database.write() as session:
        session.get_one(RunRow, c).priority = 5
        for number, run_id in ((2.0, a), (1.0, b)):
            session.get_one(RunRow, run_id).place = number
    assert order(database) == [c, b, a]


def test_what_is_held_or_waits_for_a_time_or_a_run_is_not_ready(database: Database) -> None:
    [first] = add(database)
    [held] = add(database, is_held=True)
    [later] = add(database, start_after=time.time() + 3600)
    [due] = add(database, start_after=time.time() - 1)
    [behind] = add(database, after_run_id=first)
    assert order(database) == [first, due]
    lease = claim(database, "a")
    with database.write() as session:
        assert leases.finish(session, lease, RunState.FAILED, {})
    assert behind not in order(database)  # what it waits for has not finished
    with database.write() as session:
        session.get_one(RunRow, first).state = RunState.FINISHED
    assert order(database) == [due, behind]
    assert held not in order(database)
    assert later not in order(database)


def test_a_paused_queue_starts_nothing(database: Database) -> None:
    add(database)
    with database.write() as session:
        queue.pause(session, True)
    assert order(database) == []
    with database.write() as session:
        queue.pause(session, False)
    assert len(order(database)) == 1


def test_a_run_for_all_cards_is_not_overtaken_but_other_devices_are_used(
    database: Database,
) -> None:
    [large] = add(database, num_gpus=2)
    [small] = add(database, num_gpus=1)
    [huge] = add(database, num_gpus=8, priority=9)
    [cpu] = add(database, num_gpus=0)
    cards = [
        Card(uuid="a", index=0, name="c", is_taken=True),
        Card(uuid="b", index=1, name="c"),
    ]

    def fit(row: RunRow) -> Placement:
        return place(queue.need_of(row), cards, cpu_is_free=True)

    with database.write() as session:
        found = queue.claim(session, holder("w"), fit)
    assert found is not None
    # The huge one fits no worker like this and keeps nobody; the large one keeps the small one.
    assert found[0].id == cpu
    cards[0] = Card(uuid="a", index=0, name="c")
    with database.write() as session:
        found = queue.claim(session, holder("w"), fit)
    assert found is not None
    assert (found[0].id, found[0].gpus) == (large, [0, 1])
    assert {small, huge} == set(order(database))
    assert queue.need_of(found[0]) == Need(num_gpus=2)


# ---- history, merges, workers -----------------------------------------------------------------


def test_what_happened_is_numbered_and_told_once(database: Database) -> None:
    [run_id] = add(database)
    with database.write() as session:
        events.add(session, RunRow, run_id, kind="queued", text="You launched it.")
    told = [Told(at=2.0, epoch=1, kind="began", text="Begins anew.")]
    for _ in range(2):
        with database.write() as session:
            events.add_new(session, RunRow, run_id, told)
    with database.read() as session:
        history = events.of(session, RunRow, run_id)
    assert [(e.seq, e.kind, e.epoch) for e in history] == [(1, "queued", 0), (2, "began", 1)]


class Told:
    """An event as an engine writes it."""

    def __init__(self, *, at: float, epoch: int, kind: str, text: str) -> None:
        self.at, self.epoch, self.kind, self.text = at, epoch, kind, text


def test_a_worker_executes_as_many_merges_as_it_may(database: Database) -> None:
    [run_id] = add(database)
    with database.write() as session:
        for _ in range(2):
            session.add(ArtifactRow(run_id=run_id, created_at=1.0))
    taken = []
    for owner in ("a", "a", "b"):
        with database.write() as session:
            row = leases.claim(session, ArtifactRow, holder=holder(owner), max_live=1)
            taken.append(None if row is None else row.id)
    assert taken == [1, None, 2]


def test_points_of_steps_that_are_taken_again_are_forgotten(database: Database) -> None:
    [run_id] = add(database)
    points = [Point(step=step, name="loss", value=float(step)) for step in range(1, 6)]
    with database.write() as session:
        runs.add_points(session, run_id, points)
        runs.forget_points(session, run_id, 3)
        runs.add_points(session, run_id, [Point(step=3, name="loss", value=0.5)])
    with database.read() as session:
        assert [p.value for p in runs.curve(session, run_id, "loss")] == [1.0, 2.0, 0.5]


def test_a_worker_is_listed_while_it_is_seen(database: Database) -> None:
    row = WorkerRow(
        name="w",
        host="h",
        boot_id=boot_id(),
        pid=1,
        version="1",
        started_at=1.0,
        cards=[],
        is_closing=False,
    )
    with database.write() as session:
        workers.report(session, row)
    with database.read() as session:
        assert [worker.name for worker in workers.alive(session)] == ["w"]
    with database.write() as session:
        session.get_one(WorkerRow, "w").seen_until = lease_now(session) - 601
        workers.forget_dead(session)
        assert workers.alive(session) == []
        assert session.execute(text("SELECT count(*) FROM workers")).scalar_one() == 0


def test_a_wish_is_forgotten_with_the_next_claim(database: Database) -> None:
    [run_id] = add(database, wish=Wish.PAUSE, saves_asked=3)
    claim(database, "a")
    row = get_run(database, run_id)
    assert (row.wish, row.saves_asked) == (Wish.NONE, 0)
