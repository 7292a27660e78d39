"""Where a run begins: a fork is the other run's continuation, or something new on its weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.disk import Home, RunFolder
from studio.errors import EngineError, InputError
from tests.workers.engine.conftest import MakeRun, small_spec
from tests.workers.engine.test_resume import adapter
from tests.workers.engine.test_train import losses, records, weights
from tests.workers.engine.test_wishes import said
from workers.engine.build import Training, build
from workers.engine.checkpoint import load_weights
from workers.engine.train import train

# Dropout and noise: what a fork draws must be what the other run would have drawn.
CHANGES: dict[str, Any] = {
    "lora": {"dropout": 0.2},
    "optim": {"neftune_alpha": 5.0, "schedule": "constant", "weight_decay": 0.01},
    "train": {"max_steps": 5, "epochs": 5, "save_steps": 1, "keep_checkpoints": 9},
}


@pytest.fixture(scope="module")
def parent(home: Home, bases: dict[str, Path], dataset: Path) -> RunFolder:
    """A finished run of five steps, which no test changes."""
    assert bases
    run = home.run(len(list(home.runs.iterdir())) + 1)
    run.path.mkdir()
    run.spec.write_text(small_spec(**CHANGES).model_dump_json(), encoding="utf-8")
    run.dataset.symlink_to(dataset)
    train(run)
    return run


def fork(parent: RunFolder, step: int, run: RunFolder, keep: str = "everything") -> RunFolder:
    """Give a run an origin, as the launcher does."""
    shutil.copytree(parent.checkpoint(step), run.origin / "checkpoint")
    values = {"run": 7, "step": step, "keep": keep}
    (run.origin / "origin.json").write_text(json.dumps(values))
    return run


def changed(**changes: Any) -> dict[str, Any]:
    return {
        section: {**CHANGES.get(section, {}), **changes.get(section, {})}
        for section in {*CHANGES, *changes}
    }


def moments(training: Training) -> list[torch.Tensor]:
    return [state["exp_avg"] for state in training.optimizer.state.values()]


def test_a_fork_with_everything_and_the_same_spec_is_the_continuation_to_the_bit(
    parent: RunFolder, make_run: MakeRun
) -> None:
    run = fork(parent, 2, make_run(**CHANGES))
    train(run)
    assert losses(run) == losses(parent)[2:]
    assert [record.step for record in records(run)] == [3, 4, 5]
    assert adapter(run) == adapter(parent)
    assert said(run)[0]["kind"] == "began"
    assert said(run)[0]["step"] == 2
    text = "Goes on from step 2 of run 7, with its optimizer and random numbers."
    assert said(run)[0]["text"] == text


def test_a_fork_takes_the_state_of_the_optimizer_and_the_rates_of_its_own_spec(
    parent: RunFolder, make_run: MakeRun
) -> None:
    optim = {"learning_rate": 5e-4, "weight_decay": 0.2}
    training = build(fork(parent, 2, make_run(**changed(optim=optim))))
    going_on = build(fork(parent, 2, make_run(**CHANGES)))
    assert all(torch.equal(a, b) for a, b in zip(moments(training), moments(going_on), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(training), weights(going_on), strict=True))
    (group,) = training.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (5e-4, 0.2)

    train(training.folder)
    rates = {record.values["learning_rate"] for record in records(training.folder)}
    assert rates == {5e-4}
    assert losses(training.folder)[0] == losses(parent)[2]  # of the same weights
    assert losses(training.folder)[1:] != losses(parent)[3:]
    assert adapter(training.folder) != adapter(parent)


def test_a_fork_with_another_optimizer_begins_with_a_fresh_one_and_says_so(
    parent: RunFolder, make_run: MakeRun
) -> None:
    run = fork(parent, 2, make_run(**changed(optim={"optimizer": "adamw_8bit"})))
    training = build(run)
    assert training.progress.step == 2
    assert not training.optimizer.state
    assert "with a fresh optimizer" in said(run)[0]["text"]
    train(run)
    assert losses(run)[0] == losses(parent)[2]


def test_a_fork_of_weights_begins_at_step_0_with_them(parent: RunFolder, make_run: MakeRun) -> None:
    fresh = weights(build(make_run(**CHANGES)))
    run = fork(parent, 5, make_run(**CHANGES), keep="weights")
    training = build(run)
    assert training.progress.step == 0
    assert training.progress.losses == []
    assert not training.optimizer.state
    before = weights(training)
    load_weights(parent.checkpoint(5), training.model, training.world)
    trained = weights(training)
    assert all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(trained, fresh, strict=True))
    assert said(run)[0]["text"] == "Begins with the weights of step 5 of run 7."
    train(run)
    assert [record.step for record in records(run)] == [1, 2, 3, 4, 5]


def test_a_fork_goes_on_from_its_own_checkpoint_when_it_has_one(
    parent: RunFolder, make_run: MakeRun
) -> None:
    run = fork(parent, 2, make_run(**CHANGES))
    train(run)
    before = adapter(run)
    shutil.rmtree(run.checkpoint(5))
    train(run)
    assert said(run)[-2]["text"] == "Goes on from its Checkpoint of step 4."
    assert adapter(run) == before
    assert losses(run) == losses(parent)[2:]


def test_a_fork_without_a_checkpoint_of_its_own_repeats_what_it_had_measured(
    parent: RunFolder, make_run: MakeRun
) -> None:
    run = fork(parent, 2, make_run(**CHANGES))
    train(run)
    shutil.rmtree(run.checkpoints)
    train(run)
    assert losses(run) == losses(parent)[2:]
    assert adapter(run) == adapter(parent)


def test_the_best_of_a_fork_is_one_of_its_own(parent: RunFolder, make_run: MakeRun) -> None:
    evaluated = {
        "data": {"eval_share": 0.25},
        "eval": {"every_steps": 1, "patience": 1},
        "optim": {"learning_rate": 0.5},
    }
    run = fork(parent, 2, make_run(**changed(**evaluated, train={"max_steps": 9, "epochs": 9})))
    train(run)
    result = json.loads(run.result.read_text())
    assert result["state"] == "FINISHED"
    assert result["kept_step"] == 2 < result["step"]
    assert run.checkpoint(2).exists()
    found = [record.step for record in records(run) if "eval_loss" in record.values]
    assert found[0] == 2


@pytest.mark.parametrize("steps", [3, 5])
def test_a_fork_with_nothing_left_to_do_is_refused(
    parent: RunFolder, make_run: MakeRun, steps: int
) -> None:
    run = fork(parent, 5, make_run(**changed(train={"max_steps": steps})))
    with pytest.raises(InputError, match=f"has {steps} steps in all, and step 5 of run 7") as got:
        build(run)
    assert got.value.field == "train.epochs"


def test_a_fork_of_another_shape_is_refused(parent: RunFolder, make_run: MakeRun) -> None:
    for keep in ("everything", "weights"):
        run = fork(parent, 2, make_run(**changed(lora={"rank": 8})), keep)
        with pytest.raises(EngineError, match=r"is of another model: .*lora_A"):
            build(run)


@pytest.mark.parametrize("text", ["{", "{}", '{"run": 7, "step": 2, "keep": "half"}', None])
def test_an_origin_that_says_nothing_is_refused(
    parent: RunFolder, make_run: MakeRun, text: str | None
) -> None:
    run = fork(parent, 2, make_run(**CHANGES))
    (run.origin / "origin.json").unlink()
    if text is not None:
        (run.origin / "origin.json").write_text(text)
    with pytest.raises(InputError, match=r"forked from cannot be read|cannot keep 'half'"):
        build(run)


def test_a_damaged_origin_is_refused(parent: RunFolder, make_run: MakeRun) -> None:
    run = fork(parent, 2, make_run(**CHANGES))
    (run.origin / "checkpoint" / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"forked from is damaged: state\.json has 2 of"):
        build(run)
