"""One training run, top to bottom: build, loop, step, stop.

Reads spec.json and the Datasets of a run folder, writes all its other files. A run folder that
holds a Checkpoint goes on from there: with the same number of processes bit for bit as if it had
never stopped. Every process of a run comes through here; rank 0 alone writes.
"""

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import FrameType

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from studio.disk import RunFolder
from studio.domain import metrics
from studio.domain.sample import Sample
from studio.errors import EngineError
from workers.engine.batches import MicroBatch, collate
from workers.engine.build import Training, build
from workers.engine.checkpoint import load_weights, save_adapter, save_checkpoint
from workers.engine.checkpoint_files import prune
from workers.engine.evaluate import evaluation_loss, is_hopeless
from workers.engine.full import save_full
from workers.engine.full_proofs import prove_full_learned
from workers.engine.lora import base_of
from workers.engine.lora_proofs import prove_learned
from workers.engine.loss import batch_loss
from workers.engine.noise import lengths_of, noisy_embeddings
from workers.engine.optim import learning_rate_at, set_learning_rate
from workers.engine.parallel import clip_gradients
from workers.engine.proofs import prove_loss, prove_throughput
from workers.engine.samples import sample_replies

log = logging.getLogger(__name__)

# Note of a Checkpoint: the step of the latest evaluation.
_EVALUATED = "evaluated_at"


@dataclass(slots=True)
class StopWish:
    """Whether somebody asked the run to stop."""

    is_there: bool = False


def train(folder: RunFolder) -> None:
    """Train as the run folder's spec.json says.

    A SIGTERM ends the process at once while it builds; in the loop the step is finished, and a
    Checkpoint and the Adapter are saved.

    Raises:
        InputError: The spec, the dataset or the model is wrong.
        EngineError: The run cannot go on; the message says why.
        MachineError: The disk is full or read-only.
    """
    training = build(folder)
    with _stop_wish() as wish:
        loop(training, wish)
        stop(training)
    training.world.close()


def loop(training: Training, wish: StopWish) -> None:
    """Take steps until the last one, until somebody asks to stop, or until it is hopeless."""
    spec, order, progress = training.spec, training.order, training.progress
    # A run that was stopped behind a step had no time to evaluate there.
    if progress.notes.get(_EVALUATED) != progress.step and _is_evaluated(training, progress.step):
        evaluate(training)
    training.report.stage("training", f"{order.total_steps} steps")
    for micro_batches in order.steps(progress.step):
        if is_hopeless(progress.evaluations, spec.eval.patience):
            log.info("The evaluation loss was no better %s times in a row", spec.eval.patience)
            return
        step(training, micro_batches)
        if training.world.any(wish.is_there):
            return
        if _is_evaluated(training, progress.step):
            evaluate(training)
            if spec.eval.patience is not None and training.best == progress.step:
                save(training)
        if spec.train.save_steps and progress.step % spec.train.save_steps == 0:
            save(training)


def _is_evaluated(training: Training, step: int) -> bool:
    every, order = training.spec.eval.every_steps, training.order
    if not step:
        return True
    if every is None:
        return step in order.epoch_ends
    return step % every == 0 or step == order.total_steps


def evaluate(training: Training) -> None:
    """Measure the loss on what is never trained on, ask the sample prompts, and report both."""
    spec, progress, report = training.spec, training.progress, training.report
    if training.evaluation is not None:
        report.stage("evaluating", f"{len(training.evaluation)} examples")
        loss = evaluation_loss(
            training.root,
            training.evaluation,
            training.world,
            micro_batch_size=spec.batch.micro_batch_size,
            pad_token_id=training.pad_token_id,
        )
        progress.evaluations.append((progress.step, loss))
        values = {metrics.EVAL_LOSS: loss}
        report.step(progress.step, training.order.total_steps, values)
    if spec.eval.prompts:
        report.stage("asking the sample prompts")
        replies: list[Sample] = training.root(_ask, training)
        report.samples(replies)
    progress.notes[_EVALUATED] = progress.step
    report.stage("training", f"{training.order.total_steps} steps")


def _ask(model: PeftModel | PreTrainedModel, training: Training) -> list[Sample]:
    base = base_of(model) if isinstance(model, PeftModel) else model
    return sample_replies(base, training.tokenizer, training.spec, training.progress.step)


def step(training: Training, micro_batches: Sequence[Sequence[int]]) -> None:
    """Take one optimizer step and report it.

    Args:
        training: What is trained.
        micro_batches: Places of their examples in `training.examples`, the same on every rank.

    Raises:
        EngineError: Loss or gradient is not finite; the weights are left as they were.
    """
    start = time.perf_counter()
    spec, progress = training.spec, training.progress
    number, total_steps = progress.step + 1, training.order.total_steps
    indices = list(chain.from_iterable(micro_batches))
    num_supervised = int(training.examples.supervised[indices].sum())
    losses = _backward(training, micro_batches, num_supervised)
    loss = float(losses.sum())
    parameters = [p for p in training.model.parameters() if p.requires_grad]
    norm = clip_gradients(parameters, spec.optim.max_grad_norm)
    _refuse_not_finite(training, micro_batches, losses.tolist(), norm)
    rate = learning_rate_at(spec.optim, number, total_steps)
    set_learning_rate(training.optimizer, rate)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    progress.step = number
    progress.losses.append(loss)
    seconds = time.perf_counter() - start
    num_tokens = int(training.examples.lengths[indices].sum())
    training.seconds.append(seconds)
    training.tokens.append(num_tokens)
    values = {
        metrics.LOSS: loss,
        metrics.LEARNING_RATE: rate,
        metrics.GRAD_NORM: norm,
        metrics.STEP_SECONDS: seconds,
        metrics.TOKENS_PER_SECOND: num_tokens / seconds,
        "supervised_tokens": float(num_supervised),
    }
    training.report.step(number, total_steps, values)


def _backward(
    training: Training, micro_batches: Sequence[Sequence[int]], num_supervised: int
) -> torch.Tensor:
    """Add up the gradients of a step; return the share of each micro-batch in its loss, (M,)."""
    world, size = training.world, training.world.size
    losses_M = torch.zeros(len(micro_batches), device=world.device)
    for place, (indices, weight) in enumerate(world.shares(micro_batches)):
        examples = [training.examples[index] for index in indices]
        packed = training.batch.packing
        batch = collate(examples, training.pad_token_id, packed=packed).to(world.device)
        share = training.root(_noisy_loss, training, batch, num_supervised)
        (weight * share).backward()
        if weight:
            losses_M[world.rank + place * size] = share.detach()
    return world.sum(losses_M)


def _noisy_loss(
    model: PeftModel | PreTrainedModel, training: Training, batch: MicroBatch, num_supervised: int
) -> torch.Tensor:
    embeddings, alpha = model.get_input_embeddings(), training.spec.optim.neftune_alpha
    with noisy_embeddings(embeddings, lengths_of(batch), alpha):
        return batch_loss(model, batch, num_supervised)


def save(training: Training) -> None:
    """Save a Checkpoint at the present step, and remove those that are not kept."""
    spec, folder = training.spec, training.folder
    training.report.stage("saving a checkpoint", f"step {training.progress.step}")
    save_checkpoint(folder, training.model, training.optimizer, training.world, training.progress)
    best = training.best if spec.eval.patience is not None else None
    keep = spec.train.keep_checkpoints
    training.world.from_main(lambda: len(prune(folder.checkpoints, keep, best)))
    training.report.stage("training", f"{training.order.total_steps} steps")


def stop(training: Training) -> None:
    """Save Checkpoint and result, measure what was learned, and say how the run ended."""
    spec, progress, world = training.spec, training.progress, training.world
    done, total_steps = progress.step, training.order.total_steps
    is_over = done == total_steps or is_hopeless(progress.evaluations, spec.eval.patience)
    save(training)
    kept = _kept_step(training) if is_over else None
    if kept is not None:
        training.report.stage("going back to the best evaluation", f"step {kept}")
        load_weights(training.folder.checkpoint(kept), training.model, world)
    _save_result(training)
    training.proofs.append(prove_loss(progress.losses, progress.evaluations, kept_step=kept))
    training.proofs.append(prove_throughput(training.seconds, training.tokens))
    training.report.proofs(training.proofs)
    training.report.result(
        "FINISHED" if is_over else "STOPPED",
        step=done,
        total_steps=total_steps,
        kept_step=done if kept is None else kept,
        method=spec.method,
        trainable_parameters=sum(p.numel() for p in training.model.parameters() if p.requires_grad),
    )
    training.report.stage("finished" if is_over else "stopped", f"step {done}")


def _kept_step(training: Training) -> int | None:
    """Return the step of the best evaluation where it is kept and is not the last step."""
    best = training.best
    if training.spec.eval.patience is None or best in (None, training.progress.step):
        return None
    return best


def _save_result(training: Training) -> None:
    """Write the Adapter, or the whole model when all of it was trained, and its Proof."""
    model, world, folder = training.model, training.world, training.folder
    if isinstance(model, PeftModel):
        training.report.stage("saving the adapter")
        save_adapter(model, training.spec.model.id, folder.adapter)
        # Gathers weights that are shared out, so every rank takes part.
        training.proofs.append(prove_learned(model, training.spec.lora))
        return
    training.report.stage("saving the model")
    save_full(model, training.base_folder, folder.model, world)
    training.proofs.append(
        world.from_main(lambda: prove_full_learned(folder.model, training.base_folder))
    )


def _refuse_not_finite(
    training: Training,
    micro_batches: Sequence[Sequence[int]],
    losses: Sequence[float],
    norm: float,
) -> None:
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


@contextmanager
def _stop_wish() -> Iterator[StopWish]:
    """Turn SIGTERM into a wish that the loop reads between steps."""
    wish = StopWish()

    def note(_signal: int, _frame: FrameType | None) -> None:
        wish.is_there = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGTERM, before)
