"""The real engine is killed, and its disk is full: what it has learned in the end is the same.

The disk is slow here (preload/sitecustomize.py), so that there is time between the files of a
Checkpoint.
"""

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.disk import TEMPLATES
from studio.domain.run import RunState
from studio.services import artifacts, datasets, runs
from studio.store.rows import ArtifactRow
from tests.faults.conftest import make_scene
from tests.faults.scene import Scene, wait_until, with_preload
from tests.faults.small_disk import fill, small_disk
from workers import launcher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 8
REAL = {"TRAINER": "workers.engine", "AGENT": True}
SPEC = {
    "method": "lora",
    "data": {"dataset": "desk"},
    "lora": {"rank": 4, "targets": ["attention"]},
    "batch": {"micro_batch_size": 1, "gradient_accumulation_steps": 1},
    "train": {"max_steps": STEPS, "save_steps": 2},
}
KILLED = (
    "The process was killed by the system, most often for want of memory. It is tried once more, "
    "from its latest checkpoint."
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("real")
    with small_disk(folder / "home" / "runs", 32):
        scene = make_scene(folder)
        start(scene)
        source = TEMPLATES / "data" / "tidemark-support.jsonl"
        assert datasets.import_file(scene.studio, source, "desk").row is not None
        yield scene
        scene.close()


def start(scene: Scene) -> None:
    scene.start_worker(REAL, with_preload(SLOW_DISK="0.1"))


def launch(scene: Scene) -> int:
    spec = runs.spec_from_preset(scene.studio, "tiny-qwen3.5", SPEC)
    return runs.submit(scene.studio, spec).id


@pytest.fixture(scope="module")
def undisturbed(real: Scene) -> int:
    """A run that nobody disturbs."""
    row = real.finish(run_id := launch(real))
    assert (row.state, row.epoch, row.error) == ("FINISHED", 1, None)
    return run_id


@pytest.fixture(scope="module")
def disturbed(real: Scene, undisturbed: int) -> int:
    """A run that is disturbed by one test after the other; and a merge beside it."""
    merge = artifacts.merge(real.studio, undisturbed)
    run_id = launch(real)
    kill_merge(real, merge.id)
    return run_id


def kill_merge(scene: Scene, merge_id: int) -> None:
    """Kill the process of a merge as soon as it is there."""

    def found() -> list[int]:
        mark = f"artifacts:{merge_id}:1:"
        return [pid for pid, its in launcher.all_marks() if its.startswith(mark)]

    stage = scene.home.merge(merge_id).stage
    wait_until(stage.exists, "that the merge begins")
    for pid in found():
        os.kill(pid, signal.SIGKILL)


def parts(scene: Scene, run_id: int, step: int) -> list[Path]:
    """Return the unfinished folders of a Checkpoint."""
    return list(scene.home.run(run_id).checkpoints.glob(f".step-{step:06d}.*.part"))


def wait_for_step(scene: Scene, run_id: int, step: int) -> None:
    metrics = scene.home.run(run_id).metrics

    def reached() -> bool:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return any(json.loads(line)["step"] >= step for line in lines[-1:])

    wait_until(reached, f"step {step}")


# The tests below disturb one run, in this order.


def test_p02_p27_the_rank_is_killed_in_the_middle_of_a_line(real: Scene, disturbed: int) -> None:
    wait_for_step(real, disturbed, 3)
    real.kill(disturbed, "rank")
    with real.home.run(disturbed).metrics.open("a") as file:
        file.write('{"step": 4, "total_st')
    began = time.monotonic()
    real.wait_for(disturbed, RunState.RUNNING, epoch=2)
    real.recoveries["real rank at step 3"] = time.monotonic() - began
    assert real.told(disturbed, "crashed") == [KILLED]


def test_p07_everything_is_killed_before_a_checkpoint_has_its_name(
    real: Scene, disturbed: int
) -> None:
    wait_until(
        lambda: any((part / "manifest.json").exists() for part in parts(real, disturbed, 6)),
        "the manifest of step 6",
    )
    real.kill(disturbed, "rank")
    real.kill(disturbed, "worker")
    assert not real.home.run(disturbed).checkpoint(6).exists()
    assert parts(real, disturbed, 6)
    began = time.monotonic()
    start(real)
    real.wait_for(disturbed, RunState.RUNNING, epoch=3)
    real.recoveries["all of the real trainer and the worker"] = time.monotonic() - began


def test_j15_the_disk_is_full_when_a_checkpoint_is_due(real: Scene, disturbed: int) -> None:
    wait_until(lambda: real.row(disturbed).stage == "training", "the third try")
    stuffing = fill(real.home.runs)
    row = real.finish(disturbed)
    stuffing.unlink()
    assert (row.state, row.epoch) == ("FAILED", 3)
    assert row.error is not None
    assert row.error["message"].startswith("The disk is full: ")
    assert "ree some space" in row.error["hint"]
    assert real.home.run(disturbed).checkpoint(4).is_dir()
    runs.resume(real.studio, disturbed)


def test_p01_what_was_learned_is_equal_to_the_bit(
    real: Scene, disturbed: int, undisturbed: int
) -> None:
    row = real.finish(disturbed)
    assert (row.state, row.epoch, row.error) == ("FINISHED", 4, None)
    assert real.adapter(disturbed) == real.adapter(undisturbed)
    both = disturbed, undisturbed
    losses = [runs.curves(real.studio, one, ["loss"])["loss"] for one in both]
    assert losses[0] == losses[1]
    assert real.steps(disturbed) == list(range(1, STEPS + 1))
    lines = real.home.run(disturbed).metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    log = real.home.run(disturbed).log.read_text()
    assert [line[:10] for line in log.splitlines() if line.startswith("---- try")] == [
        f"---- try {number}" for number in range(1, 5)
    ]


def test_p02_a_merge_outlives_its_process(real: Scene, disturbed: int, undisturbed: int) -> None:
    del disturbed

    def merge() -> ArtifactRow:
        [row] = artifacts.listing(real.studio)
        return row

    wait_until(lambda: RunState(merge().state).is_final, "that the merge is over")
    row = merge()
    assert (row.run_id, row.state, row.error) == (undisturbed, "FINISHED", None)
    assert row.epoch >= 2
    assert row.certificate is not None
    weights = list(real.home.merge(row.id).weights.glob("*.safetensors"))
    assert weights
    assert all(len(hashlib.sha256(file.read_bytes()).hexdigest()) == 64 for file in weights)
