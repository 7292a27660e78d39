"""SIGKILL of each process of a run at each stage (P01, P02, P06, P07): it finishes by itself."""

import socket
import time
from pathlib import Path

import pytest

from studio.domain.run import RunState
from tests.fakes import FakeDispatch
from tests.faults.scene import TICK_SECONDS, Scene, wait_until
from tests.rows import add_run, claim, get_run, make_owner, make_shop, put_back
from workers.reconcile import Reconciler

KILLED = "The process was killed by the system, most often for want of memory."
AGAIN = "It is tried once more, from its latest checkpoint."
TWICE = "It had been tried again from there before."
LOST = f"Its worker on {socket.gethostname()} was lost; it goes on from its latest checkpoint."
WITHIN_SECONDS = 15.0
# (stage, steps of the Checkpoint that the next try goes on from)
STAGES = [
    ("starting", 0),
    ("loading", 0),
    ("step 5", 4),
    ("between two files", 0),
    ("before the name", 0),
    ("finishing", 8),
]
CELLS = [(what, *stage) for what in ("rank", "worker") for stage in STAGES]
UNDER_TORCHRUN = [("agent", "between two files", 0), ("rank", "step 5", 4)]


@pytest.fixture(scope="module")
def undisturbed(scene: Scene) -> str:
    """The adapter of a run that nobody disturbed."""
    scene.need_worker()
    row = scene.finish(run_id := scene.submit())
    assert (row.state, row.epoch, scene.steps(run_id)) == ("FINISHED", 1, list(range(1, 9)))
    return scene.adapter(run_id)


def kill_at(scene: Scene, what: str, stage: str, how: str = "") -> int:
    """Kill a process of a new run at a stage, and wait until another try has begun."""
    scene.hold(stage)
    run_id = scene.submit()
    scene.wait_at(stage)
    before = scene.processes(run_id).keys()
    began = time.monotonic()
    scene.kill(run_id, what)
    wait_until(lambda: not before & scene.processes(run_id).keys(), "that all are dead")
    scene.release(stage)
    scene.need_worker()
    scene.wait_for(run_id, RunState.RUNNING, RunState.FINISHED, epoch=2)
    scene.recoveries[f"SIGKILL of {what} at {stage}{how}"] = seconds = time.monotonic() - began
    assert seconds < WITHIN_SECONDS
    return run_id


def assert_whole(scene: Scene, run_id: int, undisturbed: str, epoch: int = 2) -> None:
    """See that a disturbed run has done all that an undisturbed one does, once."""
    row = scene.finish(run_id)
    assert (row.state, row.epoch, row.error) == ("FINISHED", epoch, None)
    assert scene.steps(run_id) == list(range(1, 9))
    assert scene.adapter(run_id) == undisturbed
    assert scene.no_overlaps()


def begins_at(step: int) -> str:
    return f"Goes on from its Checkpoint of step {step}." if step else "Begins anew."


@pytest.mark.parametrize(("what", "stage", "goes_on_at"), CELLS)
def test_p01_a_run_outlives_a_kill_of_what_at_which_stage(
    scene: Scene, undisturbed: str, what: str, stage: str, goes_on_at: int
) -> None:
    scene.need_worker()
    run_id = kill_at(scene, what, stage)
    assert_whole(scene, run_id, undisturbed)
    if what == "worker":
        assert scene.told(run_id, "worker lost") == [LOST]
    else:
        assert scene.told(run_id, "crashed") == [f"{KILLED} {AGAIN}"]
    assert scene.told(run_id, "began")[-1] == begins_at(goes_on_at)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "stage", "goes_on_at"), UNDER_TORCHRUN)
def test_p02_a_run_outlives_torchrun_and_its_ranks(
    torchrun: Scene, undisturbed: str, what: str, stage: str, goes_on_at: int
) -> None:
    run_id = kill_at(torchrun, what, stage, ", under torchrun")
    assert_whole(torchrun, run_id, undisturbed)
    assert torchrun.told(run_id, "crashed") == [f"{KILLED} {AGAIN}"]
    assert torchrun.told(run_id, "began")[-1] == begins_at(goes_on_at)


def test_p02_nothing_of_a_run_outlives_its_worker(torchrun: Scene) -> None:
    torchrun.hold("step 5")
    run_id = torchrun.submit()
    torchrun.wait_at("step 5")
    assert sorted(torchrun.processes(run_id).values()) == ["agent", "rank"]
    began = time.monotonic()
    torchrun.kill(run_id, "worker")
    wait_until(lambda: not torchrun.processes(run_id))
    assert time.monotonic() - began < 1.0


def test_p01_a_worker_that_dies_while_it_claims(fresh: Scene, undisturbed: str) -> None:
    run_id = fresh.claimed()
    fresh.kill(run_id, "worker")
    assert not fresh.home.run(run_id).log.exists()
    fresh.start_worker()
    assert_whole(fresh, run_id, undisturbed)
    assert fresh.told(run_id, "worker lost") == [LOST]


def test_p01_what_an_earlier_try_said_is_not_what_the_lost_one_said(tmp_path: Path) -> None:
    shop = make_shop(tmp_path / "home")
    folder = shop.home.run(add_run(shop.database))
    folder.path.mkdir()
    first = claim(shop.database, make_owner())
    folder.owner.write_text(first.mark)
    folder.error.write_text('{"type": "E", "message": "The data is wrong.", "code": 65}')
    folder.result.write_text('{"state": "FINISHED", "step": 9}')
    put_back(shop.database, first.id)  # a user resumed it, say
    second = claim(shop.database, make_owner())
    shop.home.worker(second.owner).touch()  # it died before its trainer began
    Reconciler(shop, FakeDispatch(shop.database), patience_seconds=0.0).tick()
    row = get_run(shop.database, second.id)
    assert (row.state, row.losses, row.error) == ("QUEUED", 1, None)


def test_p01_a_run_that_had_finished_is_not_done_again(scene: Scene, undisturbed: str) -> None:
    scene.need_worker()
    scene.hold("finished")
    run_id = scene.submit()
    scene.wait_at("finished")
    scene.kill(run_id, "worker")
    scene.release("finished")
    scene.need_worker()
    assert_whole(scene, run_id, undisturbed, epoch=1)
    [words] = scene.told(run_id, "worker lost")
    assert words.endswith("was lost; the run had ended: finished.")


@pytest.mark.slow
def test_p06_everything_at_once_and_again(scene: Scene, undisturbed: str) -> None:
    scene.need_worker()
    run_id = scene.submit()
    for number, stage in enumerate(("step 3", "between two files"), start=1):
        scene.hold(stage)
        scene.need_worker()
        scene.wait_at(stage)
        scene.kill(run_id, "rank")
        scene.kill(run_id, "worker")
        scene.release(stage)
        assert scene.row(run_id).epoch == number
    scene.need_worker()
    assert_whole(scene, run_id, undisturbed, epoch=3)
    assert scene.told(run_id, "worker lost") == [LOST] * 2


def test_p23_a_run_that_is_killed_twice_at_the_same_place_has_failed(scene: Scene) -> None:
    scene.need_worker()
    scene.hold("step 3")
    run_id = scene.submit()
    for _ in range(2):
        scene.wait_at("step 3")
        scene.hold("step 3")
        scene.kill(run_id, "rank")
    scene.release("step 3")
    row = scene.finish(run_id)
    assert (row.state, row.epoch) == ("FAILED", 2)
    assert row.error is not None
    assert row.error["message"] == f"{KILLED} {TWICE}"
    assert scene.told(run_id, "crashed") == [f"{KILLED} {AGAIN}"]
    assert scene.told(run_id, "failed") == [f"{KILLED} {TWICE}"]
    log = scene.home.run(run_id).log.read_text()
    assert [line[:10] for line in log.splitlines() if line.startswith("----")] == [
        "---- try 1",
        "---- try 2",
    ]
    time.sleep(2 * TICK_SECONDS)
    assert scene.row(run_id).epoch == 2
