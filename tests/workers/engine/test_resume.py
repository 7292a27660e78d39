"""A run that stops and goes on equals one that never stopped, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from studio.disk import RunFolder
from tests.workers.engine.conftest import FAMILIES, MakeRun
from tests.workers.engine.test_train import losses, proofs, records
from workers.engine.build import Training, build
from workers.engine.train import loop, stop, train
from workers.engine.wishes import StopWish


class StopAfter(StopWish):
    """A wish that comes while a certain step is taken."""

    def __init__(self, training: Training, step: int) -> None:
        super().__init__()
        self._training, self._step = training, step

    def __getattribute__(self, name: str) -> Any:
        """Tell that the wish is there once the step is done."""
        if name == "is_there":
            return self._training.progress.step >= self._step
        return super().__getattribute__(name)


def train_until(run: RunFolder, step: int) -> None:
    training = build(run)
    loop(training, StopAfter(training, step))
    stop(training)


def adapter(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def first_shard(run: RunFolder, step: int) -> str:
    return min(path.name for path in (run.checkpoint(step) / "tensors").glob("*.safetensors"))


# Dropout, noise, packing, 8-bit state and every kind of layer: all that has a memory.
EVERYTHING: dict[str, Any] = {
    "qwen3.5": {
        "lora": {"dropout": 0.2},
        "optim": {"optimizer": "adamw_8bit", "neftune_alpha": 5.0},
    },
    "qwen3.5-moe": {
        "lora": {"targets": ["attention", "routed_experts", "router"]},
        "batch": {"packing": True, "micro_batch_size": 1, "gradient_accumulation_steps": 2},
        "data": {"max_length_tokens": 512},
    },
    "qwen3-next": {
        "lora": {"targets": ["delta_net", "shared_expert"], "dropout": 0.1},
        "optim": {"optimizer": "ademamix_8bit", "schedule": "wsd", "loraplus_ratio": 4},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_as_if_it_had_never_stopped(make_run: MakeRun, family: str) -> None:
    changes = EVERYTHING[family] | {
        "model": {"id": f"tiny/{family}"},
        "train": {"max_steps": 4, "epochs": 4},
    }
    whole, halved = make_run(**changes), make_run(**changes)
    train(whole)

    train_until(halved, 2)
    assert json.loads(halved.result.read_text())["state"] == "STOPPED"
    train(halved)

    assert json.loads(halved.result.read_text())["state"] == "FINISHED"
    assert losses(halved) == losses(whole)
    assert [record.step for record in records(halved)] == [1, 2, 3, 4]
    assert adapter(halved) == adapter(whole)


def test_a_killed_run_goes_on_from_its_latest_checkpoint_and_forgets_what_came_after(
    make_run: MakeRun,
) -> None:
    changes: dict[str, Any] = {"train": {"max_steps": 5, "epochs": 5, "save_steps": 2}}
    whole, killed = make_run(**changes), make_run(**changes)
    train(whole)
    training = build(killed)
    loop(training, StopAfter(training, 3))  # killed: neither checkpoint nor result of step 3
    with killed.metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "total_st')  # it was writing

    train(killed)

    assert losses(killed) == losses(whole)
    assert [record.step for record in records(killed)] == [1, 2, 3, 4, 5]
    assert adapter(killed) == adapter(whole)


def test_an_evaluation_that_a_stop_left_out_is_made_when_the_run_goes_on(
    make_run: MakeRun, dataset: Path
) -> None:
    changes: dict[str, Any] = {
        "data": {"dataset": dataset.stem, "eval_dataset": dataset.stem},
        "train": {"max_steps": 4, "epochs": 4},
        "eval": {"every_steps": 2},
    }
    whole, halved = make_run(**changes), make_run(**changes)
    train(whole)
    train_until(halved, 2)
    assert [step for step, _ in evaluations(halved)] == [0]
    train(halved)
    assert evaluations(halved) == evaluations(whole)
    assert [step for step, _ in evaluations(whole)] == [0, 2, 4]
    assert losses(halved) == losses(whole)


def evaluations(run: RunFolder) -> list[tuple[int, float]]:
    return [(r.step, r.values["eval_loss"]) for r in records(run) if "eval_loss" in r.values]


def test_a_damaged_checkpoint_is_passed_over(make_run: MakeRun) -> None:
    run = make_run(train={"max_steps": 4, "epochs": 4, "save_steps": 1, "keep_checkpoints": 4})
    train_until(run, 3)
    (run.checkpoint(3) / "state.json").write_text("{}")

    assert build(run).progress.step == 2
    *_, passed_over, began = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert (passed_over["kind"], passed_over["step"]) == ("passed over", 3)
    assert "The Checkpoint of step 3 was passed over: state.json has 2 of" in passed_over["text"]
    assert (began["kind"], began["step"]) == ("began", 2)


def test_only_as_many_checkpoints_as_asked_for_are_kept(make_run: MakeRun) -> None:
    run = make_run(train={"max_steps": 5, "epochs": 5, "save_steps": 1, "keep_checkpoints": 2})
    train(run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000004", "step-000005"]


def test_a_run_that_gets_worse_ends_early_with_its_best_adapter(
    make_run: MakeRun, dataset: Path
) -> None:
    # So fast a rate makes it worse from the second evaluation on.
    run = make_run(
        data={"dataset": dataset.stem, "eval_dataset": dataset.stem},
        optim={"learning_rate": 0.5, "schedule": "constant", "warmup_ratio": 0.0},
        train={"max_steps": 12, "epochs": 12},
        eval={"every_steps": 1, "patience": 2},
    )
    train(run)

    result = json.loads(run.result.read_text())
    found = [(r.step, r.values["eval_loss"]) for r in records(run) if "eval_loss" in r.values]
    best_or_base = min(found, key=lambda item: item[1])[0]
    best = min(found[1:], key=lambda item: item[1])[0]
    assert result["state"] == "FINISHED"
    assert result["step"] == best_or_base + 2 < 12
    assert result["kept_step"] == best < result["step"]
    loss = proofs(run)["loss"]
    assert loss.details["kept_step"] == best
    # The adapter on disk is that of the best step, not of the last one.
    stored = load_file(run.checkpoint(best) / "tensors" / first_shard(run, best))
    name = next(key for key in stored if key.startswith("model|"))
    saved = load_file(run.adapter / "adapter_model.safetensors")
    parameter = name.removeprefix("model|").replace(".default", "")
    assert torch.equal(saved[parameter], stored[name])


def test_sample_prompts_are_asked_before_training_and_at_each_evaluation(
    make_run: MakeRun,
) -> None:
    run = make_run(eval={"every_steps": 2, "prompts": ["Who are you?"], "prompt_tokens": 4})
    train(run)
    said = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert [sample["step"] for sample in said] == [0, 2, 3]
    assert {sample["prompt"] for sample in said} == {"Who are you?"}
