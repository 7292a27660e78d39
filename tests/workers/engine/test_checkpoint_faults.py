"""Faults at random moments and places: a Checkpoint is whole, or it is not believed.

SOAK=1 in the environment makes them many: run that by hand after changes to Checkpoints.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio.disk import RunFolder
from studio.domain.outcome import ExitCode
from studio.domain.train_spec import TrainSpec
from studio.errors import MachineError
from tests.workers.engine import savers
from tests.workers.engine.conftest import MakeRun
from tests.workers.engine.savers import Tiny
from tests.workers.engine.test_main import ROOT, start
from tests.workers.engine.test_wishes import said
from workers.engine.checkpoint import save_checkpoint
from workers.engine.checkpoint_files import latest_good
from workers.engine.world import World, open_world
from workers.process import code_of

IS_SOAK = os.getenv("SOAK") == "1"
KILLED_SAVES, DAMAGES, KILLED_RUNS = (200, 200, 20) if IS_SOAK else (30, 60, 3)
# Of the runs that are killed; how long they train at most until then.
STEPS, LONGEST_SECONDS = 50, 4.0


@pytest.fixture(scope="module")
def world() -> World:
    return open_world(TrainSpec(num_gpus=0))


# ---- (a) killed while it saves ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_save_that_is_killed_at_any_instant_costs_no_earlier_one(tmp_path: Path) -> None:
    command = [sys.executable, str(savers.__file__), str(tmp_path), str(KILLED_SAVES), "1"]
    done = subprocess.run(
        ["env", f"PYTHONPATH={ROOT}", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)  # noqa: T201  # the figures of a soak
    assert (found["wrong"], found["lost"], found["damaged"]) == (0, 0, 0)
    # The kills did hit saves, and there was something to lose.
    assert found["remains"] > KILLED_SAVES / 10
    assert found["steps"] > KILLED_SAVES / 10


# ---- (b) damaged on the disk ------------------------------------------------------------------


def cut(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(bytes(content))


def blank(path: Path, dice: random.Random) -> None:
    """Zeros from some place on, as a file system leaves that lost what was not brought to disk."""
    content = path.read_bytes()
    first = dice.randrange(len(content))
    path.write_bytes(content[:first] + bytes(len(content) - first))


def remove(path: Path, _dice: random.Random) -> None:
    path.unlink()


def empty(path: Path, _dice: random.Random) -> None:
    path.write_bytes(b"")


DAMAGING = (cut, flip, blank, remove, empty)


@pytest.fixture
def saved(tmp_path: Path, world: World) -> RunFolder:
    """A run folder with tiny Checkpoints of steps 1, 2 and 3."""
    run, tiny = RunFolder(path=tmp_path), Tiny(world)
    for _ in range(3):
        tiny.step()
        save_checkpoint(run, tiny.model, tiny.optimizer, world, tiny.progress)
    return run


def judge(run: RunFolder) -> tuple[Path | None, list[tuple[int, str]]]:
    """Return the Checkpoint that is believed, and what was said of the others."""
    found: list[tuple[int, str]] = []
    return latest_good(run.checkpoints, lambda *what: found.append(what)), found


def test_damage_of_any_kind_at_any_place_is_seen_and_the_one_before_is_taken(
    saved: RunFolder, tmp_path: Path
) -> None:
    newest, kept, dice = saved.checkpoint(3), tmp_path / "kept", random.Random(2)
    shutil.copytree(newest, kept)
    hit = set()
    for number in range(DAMAGES):
        paths = sorted(path for path in newest.rglob("*") if path.is_file())
        path, damage = dice.choice(paths), DAMAGING[number % len(DAMAGING)]
        before = path.read_bytes()
        damage(path, dice)
        if path.exists() and path.read_bytes() == before:
            continue  # zeros over zeros
        step, found = judge(saved)
        # The version in the manifest is read by nobody, so a flip there is no damage.
        if not (path.name == "manifest.json" and damage is flip and step == newest):
            assert step == saved.checkpoint(2), f"{damage.__name__} of {path.name} was believed"
            assert [number for number, _ in found] == [3]
            assert path.name in found[0][1] or path.name == "manifest.json"
        hit.add((damage.__name__, path.suffix))
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
    assert len(hit) > len(DAMAGING)
    assert latest_good(saved.checkpoints) == newest


def test_all_of_several_damaged_ones_are_passed_over(saved: RunFolder) -> None:
    (saved.checkpoint(3) / "manifest.json").write_bytes(b"")
    (saved.checkpoint(2) / "state.json").unlink()
    step, found = judge(saved)
    assert step == saved.checkpoint(1)
    assert [step for step, _ in found] == [3, 2]


# ---- a full disk ------------------------------------------------------------------------------


def make_disk(folder: Path, num_bytes: int) -> None:
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system that is small enough to fill")
    options = ["-t", "tmpfs", "-o", f"size={num_bytes},nr_inodes=200", "tmpfs", str(folder)]
    answer = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {answer.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a mebibyte."""
    folder = tmp_path / "small"
    make_disk(folder, 2**19)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, free_bytes: int) -> None:
    with (folder / "filler").open("wb", buffering=0) as file:
        file.write(bytes(shutil.disk_usage(folder).free - free_bytes))


# Too little for anything; for the tensors but not for the random numbers; for all but the manifest.
@pytest.mark.parametrize("free_bytes", [0, 4096, 8192, 12288, 16384])
def test_a_disk_that_is_full_at_any_point_of_a_save_is_a_sentence_and_costs_nothing(
    small_disk: Path, world: World, free_bytes: int
) -> None:
    run, tiny = RunFolder(path=small_disk / "run"), Tiny(world)
    tiny.step()
    save_checkpoint(run, tiny.model, tiny.optimizer, world, tiny.progress)
    tiny.step()
    fill(small_disk, free_bytes)
    with pytest.raises(MachineError) as caught:
        save_checkpoint(run, tiny.model, tiny.optimizer, world, tiny.progress)
    assert caught.value.message.startswith("The disk is full: a Checkpoint needs about 0.0 MiB,")
    assert "MiB are free. The Checkpoints before it are as they were." in caught.value.message
    assert code_of(caught.value) == ExitCode.MACHINE
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]
    assert Tiny(world).load(run.checkpoint(1))

    (small_disk / "filler").unlink()
    save_checkpoint(run, tiny.model, tiny.optimizer, world, tiny.progress)
    assert latest_good(run.checkpoints) == run.checkpoint(2)


# ---- (c) killed while it trains ---------------------------------------------------------------


def adapter_sha256(run: RunFolder) -> str:
    return hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def finish(run: RunFolder) -> float:
    began = time.monotonic()
    assert start(run).wait(timeout=300) == 0, run.log.read_text()[-3000:]
    return time.monotonic() - began


def kill_in_training(run: RunFolder, dice: random.Random, *, whole_seconds: float) -> None:
    """Kill it at some moment of its whole life, or of its steps: starting takes most of it."""
    run.stage.unlink(missing_ok=True)
    process = start(run)
    if dice.random() < 0.7:
        while process.poll() is None and not _is_training(run):
            time.sleep(0.005)
        time.sleep(dice.uniform(0, LONGEST_SECONDS))
    else:
        time.sleep(dice.uniform(0, whole_seconds))
    process.send_signal(signal.SIGKILL)
    process.wait()


def _is_training(run: RunFolder) -> bool:
    return run.stage.exists() and '"training"' in run.stage.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_adapter(make_run: MakeRun) -> None:
    changes: dict[str, Any] = {
        "lora": {"dropout": 0.2},
        "batch": {"micro_batch_size": 1},
        "train": {"max_steps": STEPS, "epochs": STEPS, "save_steps": 2},
    }
    whole, killed, dice = make_run(**changes), make_run(**changes), random.Random(3)
    seconds = finish(whole)
    for _ in range(KILLED_RUNS):
        kill_in_training(killed, dice, whole_seconds=seconds)
    finish(killed)

    assert adapter_sha256(killed) == adapter_sha256(whole)
    began = [event["step"] for event in said(killed) if event["kind"] == "began"]
    print(f"began at {began}, {seconds:.1f} s without a kill")  # noqa: T201
    assert began == sorted(began)
    assert max(began) > 0
    first, second = (run.metrics.read_text().splitlines() for run in (whole, killed))
    losses = [[json.loads(line)["values"]["loss"] for line in lines] for lines in (first, second)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
