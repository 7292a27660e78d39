"""Queue, control and forks on PostgreSQL give the same answers as on SQLite."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from studio.domain.run import RunState
from studio.services import forks, queue, runs, waiting
from studio.services.studio import Studio
from studio.store.database import Database
from tests.fakes import FakeDispatch, make_studio
from tests.servers import PostgresServer
from tests.studio.queued import add_checkpoint, add_worker, card, end, start, submit


@pytest.fixture
def shared(postgres: PostgresServer, tmp_path: Path, verdicts: Path) -> Iterator[Studio]:
    """An installation whose rows lie in PostgreSQL."""
    name = f"q_{tmp_path.name.lower()}"[:60]
    local = make_studio(tmp_path / "home", verdicts)
    database = Database(local.home.database, postgres.create_database(name))
    yield replace(local, database=database, dispatch=FakeDispatch(database))
    database.close()
    postgres.drop_database(name)


def test_order_hold_and_reasons(shared: Studio) -> None:
    add_worker(shared, "w", card(0))
    one, two, three = (submit(shared) for _ in range(3))
    queue.move_first(shared, three)
    queue.set_priority(shared, two, 9)
    queue.move_before(shared, one, two)
    queue.wait_for(shared, two, one)
    runs.pause(shared, three)
    found = waiting.overview(shared)
    assert [(item.row.id, item.why) for item in found.waiting] == [
        (one, waiting.NEXT),
        (two, f"waits for run {one} (queued)"),
        (three, "paused by you"),
    ]
    assert [len(machine.cards) for machine in found.machines] == [1]
    start(shared, one)
    runs.save_now(shared, one)
    assert runs.pause(shared, one).state == RunState.STOPPING
    assert [event.kind for event in runs.history(shared, one)] == [
        "queued", "save asked", "pause asked",
    ]  # fmt: skip


def test_a_fork_and_its_lineage(shared: Studio) -> None:
    parent = submit(shared)
    end(shared, parent, RunState.FINISHED)
    add_checkpoint(shared, parent, 4, loss=2.0)
    child = forks.fork(shared, parent, 4, forks.changed_spec(shared, parent, {})).id
    assert [row.id for row in forks.lineage_of(shared, parent).children] == [child]
    assert (shared.home.run(child).origin / "checkpoint" / "state.json").exists()
