"""Disks that are full, logs without an end, files that end in the middle of a line."""

import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studio.domain.outcome import ExitCode, is_retried
from studio.domain.run import RunState
from studio.services import runs
from tests.faults.conftest import make_scene
from tests.faults.scene import LEASE_SECONDS, ROOT, Scene, wait_until
from tests.faults.small_disk import MIB, fill, small_disk
from workers import launcher

LOG = {"workers.launcher.MAX_LOG_BYTES": MIB, "workers.launcher.KEPT_LOG_BYTES": MIB // 8}


def test_j15_a_full_disk_has_a_code_of_its_own_where_words_have_no_room(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from studio.errors import MachineError; "
        "from workers.process import run_process\n"
        "def act(): raise MachineError('The disk is full.')\n"
        "sys.exit(run_process(Path(sys.argv[1]), act, memory_hint=''))"
    )
    with small_disk(tmp_path / "small", 1) as disk:
        fill(disk)
        command = [sys.executable, "-c", code, str(disk / "error.json")]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        how = launcher.outcome(
            ended.returncode, result=disk / "result.json", error=disk / "error.json"
        )
    assert ended.returncode == ExitCode.MACHINE, ended.stderr
    assert how.error is not None
    assert how.error["message"] == (
        "The disk is full: the process could not even write down why it ended."
    )
    assert not is_retried(how.code)


@pytest.mark.slow
def test_j15_a_wish_that_has_no_room_ends_no_run(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small" / "home" / "runs", 4) as disk:
        scene = make_scene(tmp_path / "small")
        try:
            scene.start_worker()
            scene.hold("step 3")
            run_id = scene.submit()
            scene.wait_at("step 3")
            stuffing = fill(disk)
            runs.save_now(scene.studio, run_id)
            wait_until(lambda: "writing wishes.json failed" in scene.log, "the wish")
            stuffing.unlink()
            wait_until(scene.home.run(run_id).wishes.exists, "that the wish is passed on")
            scene.release("step 3")
            row = scene.finish(run_id)
            assert (row.state, row.epoch, row.error) == ("FINISHED", 1, None)
        finally:
            scene.close()


@pytest.mark.slow
def test_j16_a_run_goes_on_while_the_database_has_no_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small" / "home", 16) as disk:
        (tmp_path / "runs").mkdir()
        (disk / "runs").symlink_to(tmp_path / "runs")
        scene = make_scene(tmp_path / "small")
        try:
            scene.start_worker()
            scene.hold("step 3")
            run_id = scene.submit()
            scene.wait_at("step 3")
            wait_until(lambda: scene.row(run_id).step == 3, "step 3")
            with sqlite3.connect(scene.home.database) as connection:
                # What was logged ahead leaves no room that could be used again.
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.close()
            stuffing = fill(disk)
            scene.release("step 3")
            wait_until(scene.home.run(run_id).result.exists, "that the trainer ends")
            time.sleep(LEASE_SECONDS + 1.0)  # a full disk is no dead worker
            assert scene.workers[-1].poll() is None
            stuffing.unlink()
            assert scene.row(run_id).step == 3  # nothing could be written
            row = scene.finish(run_id)
            assert (row.state, row.epoch, row.step) == ("FINISHED", 1, 8)
            assert scene.steps(run_id) == list(range(1, 9))
            assert scene.workers[-1].poll() is None
            scene.finish(later := scene.submit())
            assert scene.row(later).state == "FINISHED"
        finally:
            scene.close()


def test_p22_a_log_without_an_end_is_cut_and_the_trainer_goes_on(fresh: Scene) -> None:
    fresh.start_worker(LOG)
    fresh.script(prints=40 * MIB)
    fresh.hold("step 5")
    run_id = fresh.submit()
    fresh.wait_at("step 5")
    log = fresh.home.run(run_id).log
    wait_until(lambda: log.stat().st_size < MIB, "the cut")
    fresh.release("step 5")
    assert fresh.finish(run_id).state == "FINISHED"
    assert log.read_text().startswith("... (the log was too long; what came before is cut off)\n")
    assert MIB // 8 <= log.stat().st_size < MIB


def test_p27_half_a_line_is_neither_read_nor_kept(scene: Scene) -> None:
    scene.need_worker()
    scene.hold("step 5")
    run_id = scene.submit()
    scene.wait_at("step 5")
    metrics = scene.home.run(run_id).metrics
    with metrics.open("a") as file:
        file.write('{"step": 6, "total_st')
    scene.kill(run_id, "worker")
    scene.release("step 5")
    scene.start_worker()
    scene.wait_for(run_id, RunState.RUNNING, RunState.FINISHED, epoch=2)
    row = scene.finish(run_id)
    assert (row.state, row.epoch) == ("FINISHED", 2)
    assert scene.steps(run_id) == list(range(1, 9))
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(
        range(1, 9)
    )


@pytest.mark.parametrize("name", ["result", "error", "stage"])
def test_a_file_that_the_disk_has_damaged_stops_nobody(scene: Scene, name: str) -> None:
    scene.need_worker()
    scene.hold("step 5")
    run_id = scene.submit()
    scene.wait_at("step 5")
    getattr(scene.home.run(run_id), name).write_bytes(b"\x00" * 40)
    if name != "stage":
        scene.kill(run_id, "worker")
    scene.release("step 5")
    scene.need_worker()
    row = scene.finish(run_id)
    assert (row.state, row.error) == ("FINISHED", None)
    assert scene.steps(run_id) == list(range(1, 9))
