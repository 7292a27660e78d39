"""What ends a run because of its numbers: values that are not finite, or nothing to learn from."""

import logging
import math
from collections.abc import Sequence
from itertools import chain

import torch

from studio.domain.outcome import ExitCode
from studio.errors import EngineError
from workers.engine.build import Training

log = logging.getLogger(__name__)

SILENT_STEPS = 20


def refuse_not_finite(
    training: Training,
    micro_batches: Sequence[Sequence[int]],
    losses: Sequence[float],
    norm: float,
) -> None:
    """Refuse a step before it changes the weights.

    Args:
        training: What is trained.
        micro_batches: Of the step.
        losses: Share of each micro-batch in the loss.
        norm: Of the gradient.

    Raises:
        EngineError: Loss or gradient is not finite; the lines of the Dataset are named.
    """
    wrong = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    if not wrong and math.isfinite(norm):
        return
    what = f"loss is {sum(losses)}" if wrong else f"gradient norm is {norm}"
    held = "micro-batches whose loss is not finite" if wrong else "step"
    _refuse_damaged_base(training)
    suspects = [micro_batches[number] for number in wrong] or micro_batches
    places = sorted({training.examples.place_of(i) for i in chain.from_iterable(suspects)})
    lines = ", ".join(training.examples.name_of(place) for place in places)
    raise EngineError(
        f"The {what} at step {training.progress.step + 1}; the weights were left as they were "
        f"before it. The {held} held these lines of the dataset: {lines}.",
        "Lower the learning rate; if it happens at step 1, look at those lines.",
        "optim.learning_rate",
        code=ExitCode.NUMERIC,
    )


def _refuse_damaged_base(training: Training) -> None:
    """Say so where no data and no rate is to blame: weights that were no numbers from the start."""
    for name, parameter in training.model.named_parameters():
        is_base = not parameter.requires_grad and parameter.is_floating_point()
        if is_base and not torch.isfinite(parameter).all():
            raise EngineError(
                f"The base weights hold values that are no numbers, the first in {name}.",
                "Compare the files with the published ones; a download may be damaged.",
                "model.id",
            )


def refuse_no_signal(training: Training, norm: float) -> None:
    """Refuse to go on when many steps in a row had nothing to learn from.

    Args:
        training: Counts such steps.
        norm: Of the gradient of the step at hand, the same on all ranks.

    Raises:
        EngineError: The gradient was exactly zero 20 times in a row.
    """
    training.silent_steps = training.silent_steps + 1 if norm == 0.0 else 0
    if training.silent_steps == 1:
        log.warning("The gradient of step %d is exactly zero", training.progress.step + 1)
    if training.silent_steps < SILENT_STEPS:
        return
    last = training.progress.step + 1
    raise EngineError(
        f"The gradient was exactly zero in {SILENT_STEPS} steps in a row ({last - SILENT_STEPS + 1}"
        f" to {last}): there is no signal, so nothing is learned.",
        "Look at what is supervised in the dataset, and at the targets: the Proofs 'mask' and "
        "'targets' show both.",
        "data.dataset",
        code=ExitCode.DATA,
    )
