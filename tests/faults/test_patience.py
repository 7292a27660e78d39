"""Clocks, workers that stand still or are closed, trainers that hang or do not listen."""

import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from studio.domain.run import RunState
from studio.services import waiting
from studio.store.clock import boot_id
from studio.store.rows import RunRow
from tests.faults.scene import LEASE_SECONDS, TICK_SECONDS, Scene, wait_until, with_preload
from workers import launcher

LOST = f"Its worker on {socket.gethostname()} was lost; it goes on from its latest checkpoint."
DAY = 86_400.0
SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


def change(scene: Scene, run_id: int, **values: object) -> None:
    with scene.database.write() as session:
        row = session.get_one(RunRow, run_id)
        for name, value in values.items():
            setattr(row, name, value)


def halted(scene: Scene, point: str) -> int:
    """Return a new Run whose trainer halts at a point."""
    scene.need_worker()
    scene.hold(point)
    run_id = scene.submit()
    scene.wait_at(point)
    return run_id


# ---- workers that stand still -----------------------------------------------------------------


@pytest.mark.slow
def test_p09_a_worker_that_stood_still_is_fenced_and_goes_on(fresh: Scene) -> None:
    first = fresh.start_worker()
    run_id = halted(fresh, "step 5")
    fresh.start_worker()
    fresh.freeze(first)
    began = time.monotonic()
    wait_until(lambda: fresh.told(run_id, "worker lost") == [LOST], "the loss")
    fresh.release("step 5")
    row = fresh.wait_for(run_id, RunState.RUNNING, RunState.FINISHED, epoch=2)
    fresh.recoveries[f"stopped worker, lease of {LEASE_SECONDS:g} s"] = time.monotonic() - began
    row = fresh.finish(run_id)
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: f"runs:{run_id}:1:" in lost_leases(fresh), "that the first notices")
    again = fresh.row(run_id)
    assert (again.state, again.epoch, again.owner) == ("FINISHED", 2, row.owner)
    assert fresh.steps(run_id) == list(range(1, 9))
    assert fresh.no_overlaps()
    assert first.poll() is None


def lost_leases(scene: Scene) -> str:
    words = ("is lost; its process is killed", "was lost: nothing is done any more")
    return "\n".join(line for line in scene.log.splitlines() if any(w in line for w in words))


@pytest.mark.slow
def test_p09_a_worker_that_stood_still_before_its_trainer_began_begins_none(fresh: Scene) -> None:
    run_id = fresh.claimed()
    first = fresh.workers[0]
    fresh.freeze(first)
    fresh.start_worker()
    row = fresh.finish(run_id)
    assert (row.state, row.epoch) == ("FINISHED", 2)
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: f"runs:{run_id}:1:" in lost_leases(fresh), "that the first notices")
    assert "---- try 1" not in fresh.home.run(run_id).log.read_text()
    again = fresh.row(run_id)
    assert (again.state, again.epoch, again.owner) == ("FINISHED", 2, row.owner)
    assert fresh.steps(run_id) == list(range(1, 9))
    assert fresh.no_overlaps()


# ---- workers that are closed --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("point", "step"), [("loading", 0), ("step 5", 5), ("finishing", 8)])
def test_p10_a_worker_that_is_closed_hands_its_run_on(scene: Scene, point: str, step: int) -> None:
    run_id = halted(scene, point)
    worker = scene.workers[-1]
    (scene.faults / "at" / "asked").unlink(missing_ok=True)
    worker.terminate()
    if point != "loading":  # then it ends at once
        scene.wait_at("asked")
        scene.release(point)
    assert worker.wait(30) == 0
    scene.release(point)
    row = scene.row(run_id)
    if point == "finishing":
        assert row.state == "FINISHED"
        return
    words = f"The worker was closed; the run goes on from step {step} when one is there."
    assert (row.state, row.crashes, row.losses) == ("QUEUED", 0, 0)
    assert scene.told(run_id, "interrupted") == [words]
    scene.start_worker()
    row = scene.finish(run_id)
    assert (row.state, row.epoch, row.error) == ("FINISHED", 2, None)
    assert scene.told(run_id, "began")[-1] == (
        f"Goes on from its Checkpoint of step {step}." if step else "Begins anew."
    )
    assert scene.steps(run_id) == list(range(1, 9))


@pytest.mark.slow
def test_p10_a_worker_that_is_closed_while_it_claims_hands_its_run_on(fresh: Scene) -> None:
    run_id = fresh.claimed()
    worker = fresh.workers[0]
    worker.terminate()
    assert worker.wait(30) == 0
    assert fresh.row(run_id).state == "QUEUED"
    words = "The worker was closed; the run goes on from step 0 when one is there."
    assert fresh.told(run_id, "interrupted") == [words]
    fresh.start_worker()
    assert fresh.finish(run_id).state == "FINISHED"


# ---- clocks -------------------------------------------------------------------------------------


def test_p11_after_a_restart_of_the_machine_a_run_goes_on_at_once(scene: Scene) -> None:
    run_id = halted(scene, "step 5")
    scene.kill(run_id, "worker")
    scene.release("step 5")
    # Another system ran then; its Lease would hold for ever on this one's clock.
    change(scene, run_id, boot_id="another-boot", lease_until=1e12)
    scene.start_worker()
    began = time.monotonic()
    row = scene.wait_for(run_id, RunState.RUNNING, epoch=2)
    scene.recoveries["restart of the machine"] = time.monotonic() - began
    assert row.boot_id == boot_id()
    assert scene.finish(run_id).state == "FINISHED"
    assert scene.told(run_id, "worker lost") == [LOST]


@pytest.mark.slow
def test_p12_a_wall_clock_that_jumps_ends_no_lease(fresh: Scene, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    fresh.start_worker(env=with_preload(FAULTY_CLOCK=str(clock)))
    run_id = halted(fresh, "step 3")
    fresh.start_worker()  # its clock is right: it would take over what seems to be lost
    for point, wrong in (("step 5", DAY), ("step 7", -DAY)):
        fresh.hold(point)
        clock.write_text(str(wrong))
        fresh.release("step 5" if wrong < 0 else "step 3")
        fresh.wait_at(point)
        time.sleep(LEASE_SECONDS + 2 * TICK_SECONDS)  # the other worker has looked, too
        until = fresh.row(run_id).lease_until
        assert until is not None
        assert 0 < until - time.clock_gettime(time.CLOCK_BOOTTIME) <= LEASE_SECONDS
    fresh.release("step 7")
    row = fresh.finish(run_id)
    assert (row.state, row.epoch) == ("FINISHED", 1)
    assert fresh.told(run_id, "worker lost") == []
    at = [event.at for event in fresh.history(run_id) if event.kind in ("saved", "finished")]
    assert max(at) - min(at) > DAY  # the clocks of worker and trainer were really wrong


# ---- trainers that hang or do not listen -----------------------------------------------------


@pytest.mark.slow
def test_p20_a_trainer_that_hangs_shows_where_and_is_tried_again(torchrun: Scene) -> None:
    run_id = halted(torchrun, "step 5")
    wait_until(lambda: torchrun.row(run_id).epoch == 2, "the second try")
    torchrun.release("step 5")
    row = torchrun.finish(run_id)
    assert (row.state, row.epoch, row.error) == ("FINISHED", 2, None)
    [words] = torchrun.told(run_id, "crashed")
    assert words.startswith("The trainer did nothing for ")
    assert words.endswith(" and was ended. It is tried once more, from its latest checkpoint.")
    log = torchrun.home.run(run_id).log.read_text()
    stacks = log.split("---- try 2")[0]
    assert 'stub.py", line' in stacks
    assert "in halt" in stacks


@pytest.mark.slow
def test_p20_a_trainer_that_is_stopped_is_killed_and_tried_again(fresh: Scene) -> None:
    fresh.start_worker(env={"STUDIO_HANG_MINUTES": "0.03"})
    run_id = halted(fresh, "step 5")
    fresh.kill(run_id, "rank", signal.SIGSTOP)
    fresh.release("step 5")
    row = fresh.finish(run_id)
    assert (row.state, row.epoch, row.error) == ("FINISHED", 2, None)
    assert fresh.no_overlaps()


@pytest.mark.slow
def test_p21_a_trainer_that_does_not_listen_is_killed_after_its_grace(torchrun: Scene) -> None:
    torchrun.script(is_deaf=True, step_seconds=0.5, steps=100)
    run_id = torchrun.submit()
    wait_until(lambda: torchrun.row(run_id).step >= 3, "step 3")
    began = time.monotonic()
    torchrun.stop(run_id)
    row = torchrun.finish(run_id)
    assert time.monotonic() - began < 1.0 + 10.0
    assert (row.state, row.error) == ("STOPPED", None)
    assert torchrun.processes(run_id) == {}
    assert torchrun.home.run(run_id).checkpoint(2).is_dir()
    torchrun.script()


# ---- processes and workers too many ----------------------------------------------------------


@pytest.mark.slow
def test_p13_two_workers_share_one_cpu_and_say_who_has_it(fresh: Scene) -> None:
    fresh.start_worker()
    fresh.start_worker()
    first = halted(fresh, "step 5")
    second = fresh.submit()
    time.sleep(4 * TICK_SECONDS)  # looks of both workers
    assert fresh.row(second).state == "QUEUED"
    owner = fresh.row(first).owner
    assert (fresh.home.slots(boot_id()) / "cpu.lock").read_text() == f"{owner} {first}\n"
    machines = waiting.overview(fresh.studio).machines
    assert {(one.name == owner, one.works) for one in machines} == {
        (True, (f"trains run {first}",)),
        (False, ()),
    }
    fresh.release("step 5")
    assert [fresh.finish(run_id).state for run_id in (first, second)] == ["FINISHED"] * 2
    assert fresh.no_overlaps()


def test_p14_a_rank_that_was_left_over_dies_within_ten_seconds(scene: Scene) -> None:
    scene.need_worker()
    row = scene.finish(run_id := scene.submit())
    mark = f"runs:{run_id}:{row.epoch}:{row.owner}"
    orphan = launcher.launch(SLEEPS, mark=mark, log=scene.faults / "orphan.log")
    assert orphan.wait(10) == -signal.SIGKILL
    wait_until(lambda: bool(scene.told(run_id, "left over")), "that it is said")
    words = "1 process of an earlier try was found and ended."
    assert scene.told(run_id, "left over") == [words]
    assert scene.row(run_id).state == "FINISHED"
