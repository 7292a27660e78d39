"""What users and bells ask for at the wrong moment: stop, stop again, and the same a thousand times."""

import threading
import time
from pathlib import Path

import pytest

from studio.domain.run import RunState
from studio.errors import ConflictError
from studio.services import runs
from studio.store import leases
from studio.store.database import Database
from studio.store.rows import RunRow
from tests.faults.scene import Scene, wait_until
from tests.rows import add_run, claim, get_run

TRIALS = 200


def assert_cpu_is_free(scene: Scene) -> None:
    """See that the next run starts."""
    row = scene.finish(scene.submit())
    assert row.state == "FINISHED"


# ---- stop ----------------------------------------------------------------------------------------


def test_p17_a_queued_run_stops_at_once(fresh: Scene) -> None:
    run_id = fresh.submit()
    fresh.stop(run_id)
    assert fresh.row(run_id).state == "STOPPED"
    assert fresh.told(run_id, "stop asked") == ["You asked it to stop."]


@pytest.mark.parametrize(
    ("stage", "step", "state"),
    [
        ("loading", 0, "STOPPED"),
        ("step 5", 5, "STOPPED"),
        ("between two files", 2, "STOPPED"),
        ("finishing", 8, "FINISHED"),
    ],
)
def test_p17_a_run_is_stopped_at_any_stage(scene: Scene, stage: str, step: int, state: str) -> None:
    scene.need_worker()
    scene.hold(stage)
    (scene.faults / "at" / "asked").unlink(missing_ok=True)
    run_id = scene.submit()
    scene.wait_at(stage)
    began = time.monotonic()
    scene.stop(run_id)
    if stage != "loading":  # there it ends at once
        scene.wait_at("asked")
    else:
        scene.finish(run_id)
    scene.release(stage)
    row = scene.finish(run_id)
    assert time.monotonic() - began < 10
    assert (row.state, row.error, row.epoch) == (state, None, 1)
    assert scene.home.run(run_id).checkpoint(step).is_dir() == bool(step)
    assert_cpu_is_free(scene)


def test_p17_a_run_is_stopped_while_it_is_claimed(fresh: Scene) -> None:
    run_id = fresh.claimed()
    fresh.stop(run_id)
    row = fresh.finish(run_id)
    assert (row.state, row.error) == ("STOPPED", None)
    assert fresh.processes(run_id) == {}


def test_p17_what_is_over_cannot_be_stopped(scene: Scene) -> None:
    scene.need_worker()
    scene.finish(run_id := scene.submit())
    with pytest.raises(ConflictError, match=rf"^Run {run_id} is FINISHED already\. Only a queued"):
        runs.stop(scene.studio, run_id)


@pytest.mark.slow
def test_p18_a_stop_that_races_with_the_end_leaves_one_end(tmp_path: Path) -> None:
    database = Database(tmp_path / "studio.db")
    ends = []
    for _ in range(TRIALS):
        run_id = add_run(database)
        lease = claim(database, "worker")
        barrier = threading.Barrier(2)
        done: list[bool] = []

        def ask(run_id: int = run_id, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with database.write() as session:
                leases.move(session, RunRow, run_id, RunState.STOPPING)

        def end(
            lease: leases.Lease = lease,
            barrier: threading.Barrier = barrier,
            done: list[bool] = done,
        ) -> None:
            barrier.wait()
            for state in (RunState.FINISHED, RunState.STOPPED):
                with database.write() as session:
                    done.append(leases.finish(session, lease, state, {}))

        threads = [threading.Thread(target=act) for act in (ask, end)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == [True, False]  # it ends once, whoever was first
        ends.append(get_run(database, run_id).state)
    assert ends == ["FINISHED"] * TRIALS


@pytest.mark.parametrize("stage", ["loading", "step 5", "between two files"])
def test_p19_a_stop_is_heard_although_the_worker_is_dead(scene: Scene, stage: str) -> None:
    scene.need_worker()
    scene.hold(stage)
    run_id = scene.submit()
    scene.wait_at(stage)
    scene.kill(run_id, "worker")
    scene.stop(run_id)
    assert scene.row(run_id).state == "STOPPING"
    scene.release(stage)
    scene.start_worker()
    row = scene.finish(run_id)
    assert (row.state, row.epoch, row.error) == ("STOPPED", 1, None)
    [words] = scene.told(run_id, "worker lost")
    assert words.endswith("was lost; the run had ended: stopped.")
    assert scene.processes(run_id) == {}


# ---- bells ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_p15_a_thousand_bells_are_one(scene: Scene) -> None:
    scene.need_worker()
    scene.hold("step 5")
    run_id = scene.submit()
    for _ in range(1000):
        scene.ring()
    scene.wait_at("step 5")
    scene.release("step 5")
    queue = scene.home.broker / "queue"
    row = scene.finish(run_id)
    assert (row.state, row.epoch) == ("FINISHED", 1)
    wait_until(lambda: not list(queue.iterdir()), "that all bells are heard")
    assert scene.row(run_id).epoch == 1  # stale bells of a run that is over change nothing
    assert scene.no_overlaps()
    assert scene.need_worker().poll() is None
