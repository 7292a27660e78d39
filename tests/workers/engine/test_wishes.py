"""What is asked of a run while it trains: saves, evaluations, its end for another worker."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio.disk import RunFolder, write_whole
from studio.domain.outcome import ExitCode
from tests.workers.engine.conftest import MakeRun
from tests.workers.engine.test_main import ROOT, wait_for_lines
from tests.workers.engine.test_train import losses, records
from workers.engine.build import Training, build
from workers.engine.train import loop, stop, train
from workers.engine.wishes import StopWish
from workers.fence import MARK, FencedError

OURS, THEIRS = "runs:1:1:a", "runs:1:2:b"


class Between(StopWish):
    """Does something between two steps, when the loop asks whether it shall stop."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act = act

    def __getattribute__(self, name: str) -> Any:
        """Do it when the wish is looked at."""
        if name == "is_there":
            self._act()
        return super().__getattribute__(name)


def events(run: RunFolder) -> list[tuple[str, int]]:
    return [(event["kind"], event["step"]) for event in said(run)]


def said(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events.read_text().splitlines()]


def wish(run: RunFolder, saves: int, evaluations: int) -> None:
    write_whole(run.wishes, json.dumps({"saves": saves, "evaluations": evaluations}))


def evaluations(run: RunFolder) -> list[int]:
    return [record.step for record in records(run) if "eval_loss" in record.values]


def test_wishes_are_fulfilled_once_behind_the_step_in_which_they_come(
    make_run: MakeRun, dataset: Path
) -> None:
    changes: dict[str, Any] = {
        "data": {"dataset": dataset.stem, "eval_dataset": dataset.stem},
        "eval": {"every_steps": 2, "patience": 100},
        "train": {"max_steps": 6, "epochs": 6},
    }
    plain, asked = make_run(**changes), make_run(**changes)
    train(plain)
    wish(asked, saves=1, evaluations=0)  # while it is built
    training = build(asked)

    def ask() -> None:
        if training.progress.step == 3:
            wish(asked, saves=4, evaluations=1)
        if training.progress.step == 5:
            asked.wishes.write_text("{")

    loop(training, Between(ask))
    stop(training)
    assert [event for event in events(asked) if event not in events(plain)] == [
        ("saved", 1),
        ("evaluated", 3),
        ("saved", 3),
    ]
    assert evaluations(asked) == [0, 2, 3, 4, 6]
    # It is shown, and counts for nothing.
    assert [step for step, _ in training.progress.evaluations] == evaluations(plain)
    texts = [event["text"] for event in said(asked)]
    assert texts[:2] == ["Begins anew.", "Checkpoint of step 1 saved, as asked."]
    assert any(text.startswith("Evaluated at step 3: loss ") for text in texts)
    assert "Checkpoint of step 3 saved, as asked." in texts
    assert "Checkpoint of step 2 saved, as its evaluation is the best so far." in texts
    assert {event["epoch"] for event in said(asked)} == {0}
    assert all(abs(time.time() - event["at"]) < 300 for event in said(asked))
    # Neither changes what is learned.
    assert losses(asked) == losses(plain)


def test_an_evaluation_of_nothing_is_answered(make_run: MakeRun) -> None:
    run = make_run(train={"max_steps": 1})
    wish(run, saves=0, evaluations=1)
    train(run)
    text = next(event["text"] for event in said(run) if event["kind"] == "evaluated")
    assert text.startswith("There is nothing to evaluate")


def test_time_alone_saves_when_the_next_step_would_be_too_late(make_run: MakeRun) -> None:
    # A step takes longer than 6 ms, so each is the last before the time is up.
    run = make_run(train={"max_steps": 3, "epochs": 3, "save_minutes": 1e-4})
    train(run)
    assert events(run) == [("began", 0), ("saved", 1), ("saved", 2), ("saved", 3)]
    run = make_run(train={"max_steps": 3, "epochs": 3, "save_minutes": None})
    train(run)
    assert events(run) == [("began", 0), ("saved", 3)]


# ---- another worker takes the run over --------------------------------------------------------


@pytest.fixture
def fenced(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> Training:
    """A run with a Checkpoint of step 1, built by the worker that will lose it."""
    monkeypatch.setenv(MARK, OURS)
    run = make_run(train={"max_steps": 50, "epochs": 50})
    run.owner.write_text(OURS)
    wish(run, saves=1, evaluations=0)
    return build(run)


def files(run: RunFolder) -> dict[str, bytes]:
    return {
        str(path.relative_to(run.path)): path.read_bytes()
        for path in sorted(run.path.rglob("*"))
        if path.is_file() and path not in (run.owner, run.log)
    }


def test_a_run_that_was_taken_over_ends_behind_its_step_and_writes_nothing(
    fenced: Training,
) -> None:
    run = fenced.folder
    before: list[dict[str, bytes]] = []

    def take_over() -> None:
        if fenced.progress.step == 2:
            run.owner.write_text(THEIRS)
            before.append(files(run))

    with pytest.raises(FencedError):
        loop(fenced, Between(take_over))
    assert fenced.progress.step == 2
    assert files(run) == before[0]
    assert {event["epoch"] for event in said(run)} == {1}


@pytest.mark.parametrize("step", [0, 1])
def test_neither_checkpoint_nor_adapter_nor_result_is_published_any_more(
    fenced: Training, step: int
) -> None:
    run = fenced.folder
    if step:
        # Still ours behind the step, and lost before the Checkpoint.
        loop(fenced, StopWish(is_there=True))
    run.owner.write_text(THEIRS)
    before = files(run)
    with pytest.raises(FencedError):
        stop(fenced)
    assert files(run) == before
    assert not run.result.exists()
    assert not run.adapter.exists()


def start(run: RunFolder, processes: int, mark: str) -> subprocess.Popen[bytes]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with run.log.open("ab") as log:
        return subprocess.Popen(
            ["env", f"{MARK}={mark}", *command, "-m", "workers.engine", str(run.path)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )


# torchrun says 1 whatever its ranks say.
@pytest.mark.parametrize(("processes", "code"), [(1, ExitCode.FENCED), (2, 1)])
@pytest.mark.slow
def test_a_trainer_that_was_taken_over_leaves_no_newer_file(
    make_run: MakeRun, processes: int, code: int
) -> None:
    run = make_run(
        train={"max_steps": 5000, "epochs": 1000, "save_steps": 1},
        batch={"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    run.owner.write_text(OURS)
    process = start(run, processes, OURS)
    wait_for_lines(run.metrics, 4, process)
    wish(run, saves=0, evaluations=1)
    wait_for_lines(run.metrics, 6, process)
    write_whole(run.owner, THEIRS)
    taken_over = time.time()
    assert process.wait(timeout=120) == code, run.log.read_text()[-3000:]

    newer = [
        path
        for path in run.path.rglob("*")
        # Between looking and writing are microseconds; a step takes longer than 50 ms.
        if path.is_file() and path != run.log and path.stat().st_mtime > taken_over + 0.05
    ]
    assert newer == []
    assert not run.error.exists()
    assert not run.result.exists()
    assert ("evaluated", 4) in events(run) or ("evaluated", 5) in events(run)
    assert run.log.read_text().count("Another worker has taken this run over.") == processes
