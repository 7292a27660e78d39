"""Numbers that end a run, and what it keeps then."""

import logging
from typing import Any

import pytest
import torch

from studio.domain.outcome import ExitCode
from studio.errors import EngineError
from tests.workers.engine.conftest import MakeRun
from tests.workers.engine.test_train import losses, weights
from workers.engine.build import Training, build
from workers.engine.checkpoint import load_weights
from workers.engine.checkpoint_files import latest_good
from workers.engine.health import SILENT_STEPS
from workers.engine.train import loop, step
from workers.engine.wishes import StopWish
from workers.process import code_of


def silence(training: Training) -> list[Any]:
    """Let every gradient be zero."""
    trained: list[Any] = [p for p in training.model.parameters() if p.requires_grad]
    return [parameter.register_hook(torch.zeros_like) for parameter in trained]


def test_steps_without_a_signal_end_a_run(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    training = build(make_run(train={"max_steps": 50, "epochs": 50}))
    step(training, [[0]])
    silence(training)
    caplog.set_level(logging.WARNING)
    for _ in range(SILENT_STEPS - 1):
        step(training, [[0]])
    with pytest.raises(EngineError) as caught:
        step(training, [[0]])
    assert "exactly zero in 20 steps in a row (2 to 21): there is no signal" in caught.value.message
    assert code_of(caught.value) == ExitCode.DATA
    assert caplog.text.count("exactly zero") == 1
    assert training.progress.step == 20


def test_one_step_with_a_signal_begins_the_count_anew(make_run: MakeRun) -> None:
    training = build(make_run(train={"max_steps": 50, "epochs": 50}))
    for _ in range(2):
        hooks = silence(training)
        for _ in range(SILENT_STEPS - 1):
            step(training, [[0]])
        for hook in hooks:
            hook.remove()
        step(training, [[0]])
    assert training.silent_steps == 0


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint_and_names_the_lines(
    make_run: MakeRun,
) -> None:
    run = make_run(train={"max_steps": 9, "epochs": 9, "save_steps": 1})
    training = build(run)
    before: list[torch.Tensor] = []

    def poison(_module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        if training.progress.step < 2:
            return embedded
        before[:] = weights(training)
        return embedded * torch.nan

    embeddings: Any = training.model.get_input_embeddings()
    embeddings.register_forward_hook(poison)
    with pytest.raises(EngineError, match=r"loss is nan at step 3; .* lines of the dataset") as got:
        loop(training, StopWish())
    assert code_of(got.value) == ExitCode.NUMERIC
    assert latest_good(run.checkpoints) == run.checkpoint(2)
    assert len(losses(run)) == 2
    assert not run.adapter.exists()
    load_weights(run.checkpoint(2), training.model, training.world)
    kept = weights(training)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept)
