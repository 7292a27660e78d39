"""Whole runs of a few steps, and what stops them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.disk import Home, RunFolder
from studio.domain.conversation import Conversation
from studio.domain.metrics import StepRecord
from studio.domain.proof import Proof, Proofs
from studio.errors import EngineError, InputError
from tests.workers.engine.conftest import MakeRun, store
from workers.engine.build import Training, build
from workers.engine.evaluate import evaluation_loss
from workers.engine.lora import load_adapter
from workers.engine.model import load_base
from workers.engine.train import step, stop, train


def records(run: RunFolder) -> list[StepRecord]:
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    return [StepRecord.model_validate_json(line) for line in lines]


def losses(run: RunFolder) -> list[float]:
    return [record.values["loss"] for record in records(run) if "loss" in record.values]


def proofs(run: RunFolder) -> dict[str, Proof]:
    found = Proofs.model_validate_json(run.proofs.read_text(encoding="utf-8"))
    return {proof.name: proof for proof in found.proofs}


def test_a_run_leaves_all_that_its_folder_promises(make_run: MakeRun) -> None:
    run = make_run()
    train(run)
    result = json.loads(run.result.read_text())
    assert result["state"] == "FINISHED"
    assert (result["step"], result["total_steps"]) == (3, 3)
    assert result["peak_memory_bytes"] > 2**20
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] or result["versions"]
    assert json.loads(run.stage.read_text()) == {"stage": "finished", "detail": "step 3"}
    steps = records(run)
    assert [record.step for record in steps] == [1, 2, 3]
    assert {record.total_steps for record in steps} == {3}
    assert set(steps[0].values) == {
        "loss",
        "learning_rate",
        "grad_norm",
        "step_seconds",
        "tokens_per_second",
        "supervised_tokens",
    }
    measured = proofs(run)
    assert {name: proof.passed for name, proof in measured.items()} == {
        "mask": True,
        "kernels": True,
        "coverage": True,
        "targets": True,
        "learned": True,
        "loss": None,
        "throughput": None,
    }
    assert measured["throughput"].details["tokens_per_second"] > 0
    assert (run.adapter / "adapter_model.safetensors").exists()
    assert (run.checkpoint(3) / "state.json").exists()
    assert not run.error.exists()
    left = [path.name for path in run.path.rglob(".*")]
    assert left == []


def test_the_adapter_of_a_run_loads_on_nf4_and_on_sixteen_bits(
    make_run: MakeRun, bases: dict[str, Path]
) -> None:
    run = make_run(model={"id": "tiny/qwen3-next"}, lora={"targets": ["shared_expert"]})
    train(run)
    assert proofs(run)["coverage"].passed
    for method in ("qlora", "lora"):
        load_adapter(load_base(bases["qwen3-next"], method=method), run.adapter)


def test_what_is_kept_out_is_measured_before_training_and_after_each_epoch(
    make_run: MakeRun,
) -> None:
    changes: dict[str, Any] = {"train": {"epochs": 2, "max_steps": None}}
    run = make_run(data={"eval_share": 0.25}, lora={"dropout": 0.1}, **changes)
    train(run)
    found = [(r.step, r.values["eval_loss"]) for r in records(run) if "eval_loss" in r.values]
    total = json.loads(run.result.read_text())["total_steps"]
    assert [step for step, _ in found] == [0, (total + 1) // 2, total]
    assert found[-1][1] < found[0][1]
    assert all(set(r.values) == {"eval_loss"} for r in records(run) if r.step == 0)
    details = proofs(run)["loss"].details
    assert (details["eval_first"], details["eval_last"]) == (found[0][1], found[-1][1])


def test_measuring_changes_no_loss(make_run: MakeRun, dataset: Path) -> None:
    plain, measured = (
        make_run(data={"dataset": dataset.stem, **data}, lora={"dropout": 0.2})
        for data in ({}, {"eval_dataset": dataset.stem})
    )
    train(plain)
    train(measured)
    assert losses(plain) == losses(measured)


def test_evaluation_loss_is_the_mean_over_supervised_tokens(make_run: MakeRun) -> None:
    training = build(make_run(train={"max_steps": 1}))
    found = [
        evaluation_loss(
            training.root,
            training.examples,
            training.world,
            micro_batch_size=size,
            pad_token_id=0,
        )
        for size in (1, 5, 24)
    ]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)
    assert training.model.training
    step(training, [range(len(training.examples))])
    assert training.progress.losses[0] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_same_seed_gives_bit_identical_losses(make_run: MakeRun, method: str) -> None:
    first, second, other = (
        make_run(method=method, lora={"dropout": 0.1}, train={"max_steps": 4, "seed": seed})
        for seed in (1, 1, 2)
    )
    for run in (first, second, other):
        train(run)
    assert losses(first) == losses(second)
    assert losses(first) != losses(other)


def test_micro_batch_times_accumulation_gives_the_same_losses(make_run: MakeRun) -> None:
    found = []
    for size in (1, 2, 8):
        batch = {"micro_batch_size": size, "gradient_accumulation_steps": 8 // size}
        run = make_run(batch=batch, train={"max_steps": 2})
        train(run)
        found.append(losses(run))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_gradient_checkpointing_changes_no_loss(make_run: MakeRun) -> None:
    plain, saving = make_run(), make_run(train={"recompute": "all"})
    train(plain)
    train(saving)
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)


def test_an_attempt_after_the_end_changes_nothing(make_run: MakeRun) -> None:
    run = make_run(train={"max_steps": 2})
    train(run)
    before = losses(run), (run.adapter / "adapter_model.safetensors").read_bytes()
    run.error.write_text("{}")
    train(run)
    assert (losses(run), (run.adapter / "adapter_model.safetensors").read_bytes()) == before
    assert not run.error.exists()


def test_one_conversation_fills_every_step(
    make_run: MakeRun, home: Home, conversations: list[Conversation]
) -> None:
    run = make_run(batch={"gradient_accumulation_steps": 2}, train={"epochs": 20})
    run.dataset.unlink()
    run.dataset.symlink_to(store(home, conversations[:1]))
    train(run)
    assert len(losses(run)) == 3
    tokens = {record.values["supervised_tokens"] for record in records(run)}
    assert len(tokens) == 1


def test_packing_is_turned_off_where_examples_see_each_other(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "batch": {"packing": True, "micro_batch_size": 2},
        "data": {"max_length_tokens": 256},
    }
    packed, leaky = make_run(**changes), make_run(**changes)
    train(packed)
    assert proofs(packed)["leak"].passed is True

    def one_document(bounds: torch.Tensor) -> list[tuple[int, int]]:
        return [(0, int(bounds[-1]))]

    # Convolution and delta rule take the whole row for one document.
    monkeypatch.setattr("workers.engine.varlen.bounds_of", one_document)
    training = build(leaky)
    assert training.batch.packing is False
    assert training.order.row_tokens is None
    leak = next(proof for proof in training.proofs if proof.name == "leak")
    assert leak.passed is False
    assert "see each other" in leak.summary
    train(leaky)
    assert json.loads(leaky.result.read_text())["state"] == "FINISHED"
    assert proofs(leaky)["leak"].passed is False


# ---- what stops a run -------------------------------------------------------------------------


def broken_base(base: Path, folder: Path, tensor: str) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].fill_(torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights(training: Training) -> list[torch.Tensor]:
    return [p.detach().clone() for p in training.model.parameters() if p.requires_grad]


def test_a_loss_that_is_no_number_names_its_conversations_before_the_weights_change(
    make_run: MakeRun,
) -> None:
    training = build(make_run())
    before = weights(training)
    poisoned = torch.from_numpy(training.examples[5].tokens.astype(int))

    def poison(_module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        rows = inputs[0][:, : len(poisoned)]
        hit = rows.shape[1] == len(poisoned) and (rows == poisoned).all(1).any()
        return embedded * torch.nan if hit else embedded

    embeddings: Any = training.model.get_input_embeddings()
    embeddings.register_forward_hook(poison)
    numbers = sorted(training.examples[index].line + 1 for index in (2, 5))
    lines = ", ".join(str(number) for number in numbers)
    with pytest.raises(EngineError) as caught:
        step(training, [[7], [2, 5], [0]])
    assert "The loss is nan at step 1" in caught.value.message
    assert f"not finite held these lines of the dataset: {lines}." in caught.value.message
    assert all(torch.equal(a, b) for a, b in zip(before, weights(training), strict=True))
    assert not training.folder.metrics.exists()


def test_a_base_with_values_that_are_no_numbers_is_blamed_itself(
    make_run: MakeRun, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = broken_base(bases["qwen3.5"], tmp_path / "nan", "lm_head.weight")
    with pytest.raises(EngineError, match=r"no numbers, the first in .*lm_head\.weight") as caught:
        train(make_run(model={"id": str(base)}))
    assert caught.value.field == "model.id"


def test_a_gradient_that_is_no_number_stops_too(make_run: MakeRun) -> None:
    training = build(make_run())
    trainable: Any = next(p for p in training.model.parameters() if p.requires_grad)
    trainable.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(EngineError, match="gradient norm is"):
        step(training, [range(2)])


def test_more_gpus_than_there_are_is_a_sentence(make_run: MakeRun) -> None:
    with pytest.raises(EngineError, match="asks for 2 GPUs, but PyTorch finds"):
        train(make_run(train={"num_gpus": 2}))
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="finds no CUDA GPU on this machine"):
            train(make_run(train={"num_gpus": 1}))


def test_too_long_examples_are_a_sentence(make_run: MakeRun) -> None:
    with pytest.raises(EngineError, match=r"longer than 20 tokens; the longest is line \d+"):
        train(make_run(data={"max_length_tokens": 20}))


def test_a_broken_spec_is_the_users_fault(make_run: MakeRun) -> None:
    run = make_run()
    run.spec.write_text("{")
    with pytest.raises(InputError, match=r"no readable spec.json"):
        train(run)
    run.spec.write_text('{"lora": {"rank": 0}}')
    with pytest.raises(InputError, match=r"lora.rank is 0"):
        train(run)


def test_a_stopped_run_says_so(make_run: MakeRun) -> None:
    training = build(make_run())
    step(training, [range(4)])
    stop(training)
    result = json.loads(training.folder.result.read_text())
    assert (result["state"], result["step"], result["total_steps"]) == ("STOPPED", 1, 3)
