"""One training run, top to bottom: build, loop, step, stop.

Reads spec.json and the Datasets of a run folder, writes all its other files. A run folder that
holds a Checkpoint goes on from there: with the same number of processes bit for bit as if it had
never stopped. Every process of a run comes through here; rank 0 alone writes.
"""

import logging
import time
from collections.abc import Sequence
from itertools import chain

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from studio.disk import RunFolder
from studio.domain import metrics
from studio.domain.sample import Sample
from workers.engine.batches import MicroBatch, collate
from workers.engine.build import Training, build
from workers.engine.checkpoint import load_weights, save_adapter, save_checkpoint
from workers.engine.checkpoint_files import prune
from workers.engine.evaluate import evaluation_loss, is_hopeless
from workers.engine.full import save_full
from workers.engine.full_proofs import prove_full_learned
from workers.engine.health import refuse_no_signal, refuse_not_finite
from workers.engine.lora import base_of
from workers.engine.lora_proofs import prove_learned
from workers.engine.loss import batch_loss
from workers.engine.noise import lengths_of, noisy_embeddings
from workers.engine.optim import learning_rate_at, set_learning_rate
from workers.engine.parallel import clip_gradients
from workers.engine.proofs import prove_loss, prove_throughput
from workers.engine.samples import sample_replies
from workers.engine.wishes import Agreed, StopWish, Wishes, stop_wish
from workers.fence import fence_of

log = logging.getLogger(__name__)

# Note of a Checkpoint: the step of the latest evaluation.
_EVALUATED = "evaluated_at"


def train(folder: RunFolder) -> None:
    """Train as the run folder's spec.json says.

    A SIGTERM ends the process at once while it builds; in the loop the step is finished, and a
    Checkpoint and the Adapter are saved.

    Raises:
        InputError: The spec, the dataset or the model is wrong.
        EngineError: The run cannot go on; the message says why.
        MachineError: The disk is full or read-only.
        FencedError: Another worker has taken the run over.
    """
    training = build(folder)
    with stop_wish() as wish:
        loop(training, wish)
        stop(training)
    training.world.close()


def loop(training: Training, wish: StopWish) -> None:
    """Take steps until the last one, until somebody asks to stop, or until it is hopeless."""
    spec, order, progress = training.spec, training.order, training.progress
    wishes = Wishes(training.folder, training.world, wish)
    # A run that was stopped behind a step had no time to evaluate there.
    if progress.notes.get(_EVALUATED) != progress.step and _is_evaluated(training, progress.step):
        evaluate(training)
        _save_best(training)
    training.report.stage("training", f"{order.total_steps} steps")
    training.saved_at = time.monotonic()
    for micro_batches in order.steps(progress.step):
        if is_hopeless(progress.evaluations, spec.eval.patience):
            log.info("The evaluation loss was no better %s times in a row", spec.eval.patience)
            return
        step(training, micro_batches)
        agreed = wishes.agree(save_is_due=_save_is_due(training))
        if agreed.stop:
            return
        is_planned = _is_evaluated(training, progress.step)
        if agreed.evaluate or is_planned:
            loss = evaluate(training, is_planned=is_planned)
            if agreed.evaluate:
                training.report.event("evaluated", progress.step, _answer(training, loss))
            if is_planned:
                _save_best(training)
        _save_as_agreed(training, agreed)


def _save_as_agreed(training: Training, agreed: Agreed) -> None:
    chosen, step = training.spec.train, training.progress.step
    if agreed.save:
        save(training, "as asked")
    elif chosen.save_steps and step % chosen.save_steps == 0:
        save(training, f"as every {chosen.save_steps} steps")
    elif agreed.save_is_due:
        save(training, f"as {chosen.save_minutes:g} minutes were over")


def _save_is_due(training: Training) -> bool:
    """Tell whether the next step could end later than the spec lets a Checkpoint wait."""
    minutes, now = training.spec.train.save_minutes, time.monotonic()
    return minutes is not None and now - training.saved_at + training.seconds[-1] >= 60 * minutes


def _save_best(training: Training) -> None:
    """Keep the weights of the best evaluation, where they may become the Adapter."""
    step, patience = training.progress.step, training.spec.eval.patience
    if step and patience is not None and training.best == step:
        save(training, "as its evaluation is the best so far")


def _answer(training: Training, loss: float | None) -> str:
    """Return what whoever asked for an evaluation is told."""
    number = training.progress.step
    if loss is not None:
        return f"Evaluated at step {number}: loss {loss:.4f}."
    if training.spec.eval.prompts:
        return f"The sample prompts were asked at step {number}."
    return "There is nothing to evaluate: neither evaluation examples nor sample prompts."


def _is_evaluated(training: Training, step: int) -> bool:
    every, order = training.spec.eval.every_steps, training.order
    if not step:
        return True
    if every is None:
        return step in order.epoch_ends
    return step % every == 0 or step == order.total_steps


def evaluate(training: Training, *, is_planned: bool = True) -> float | None:
    """Measure the loss on what is never trained on, ask the sample prompts, and report both.

    Args:
        training: What is trained.
        is_planned: Whether the spec says so. What somebody asked for is shown, but does not count
            for early stopping, or asking would change what the run learns.

    Returns:
        The loss; None where there is nothing to measure it on.
    """
    spec, progress, report = training.spec, training.progress, training.report
    loss: float | None = None
    if training.evaluation is not None:
        report.stage("evaluating", f"{len(training.evaluation)} examples")
        loss = evaluation_loss(
            training.root,
            training.evaluation,
            training.world,
            micro_batch_size=spec.batch.micro_batch_size,
            pad_token_id=training.pad_token_id,
        )
        if is_planned:
            progress.evaluations.append((progress.step, loss))
        values = {metrics.EVAL_LOSS: loss}
        report.step(progress.step, training.order.total_steps, values)
    if spec.eval.prompts:
        report.stage("asking the sample prompts")
        replies: list[Sample] = training.root(_ask, training)
        report.samples(replies)
    progress.notes[_EVALUATED] = progress.step
    training.saved_step = None
    report.stage("training", f"{training.order.total_steps} steps")
    return loss


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
    refuse_not_finite(training, micro_batches, losses.tolist(), norm)
    refuse_no_signal(training, norm)
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


def save(training: Training, why: str) -> None:
    """Save a Checkpoint at the present step, and remove those that are not kept.

    Nothing is done where one was saved, or gone on from, since anything has changed.

    Args:
        training: What is trained.
        why: For a person, as in "as every 100 steps".
    """
    spec, folder, step = training.spec, training.folder, training.progress.step
    if training.saved_step == step:
        return
    training.report.stage("saving a checkpoint", f"step {step}")
    save_checkpoint(folder, training.model, training.optimizer, training.world, training.progress)
    best = training.best if spec.eval.patience is not None else None
    keep = spec.train.keep_checkpoints
    training.world.from_main(fence_of(folder).check)
    training.world.from_main(lambda: len(prune(folder.checkpoints, keep, best)))
    training.saved_step, training.saved_at = step, time.monotonic()
    training.report.event("saved", step, f"Checkpoint of step {step} saved, {why}.")
    training.report.stage("training", f"{training.order.total_steps} steps")


def stop(training: Training) -> None:
    """Save Checkpoint and result, measure what was learned, and say how the run ended."""
    spec, progress, world = training.spec, training.progress, training.world
    done, total_steps = progress.step, training.order.total_steps
    is_over = done == total_steps or is_hopeless(progress.evaluations, spec.eval.patience)
    save(training, "as the run is over" if is_over else "as the run was stopped")
    kept = _kept_step(training) if is_over else None
    if kept is not None:
        training.report.stage("going back to the best evaluation", f"step {kept}")
        load_weights(training.folder.checkpoint(kept), training.model, world)
    _save_result(training)
    training.proofs.append(prove_loss(progress.losses, progress.evaluations, kept_step=kept))
    training.proofs.append(prove_throughput(training.seconds, training.tokens))
    training.report.proofs(training.proofs)
    world.from_main(fence_of(training.folder).check)
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
    fence = fence_of(folder)
    world.from_main(fence.check)
    if isinstance(model, PeftModel):
        training.report.stage("saving the adapter")
        save_adapter(model, training.spec.model.id, folder.adapter, fence)
        # Gathers weights that are shared out, so every rank takes part.
        training.proofs.append(prove_learned(model, training.spec.lora))
        return
    training.report.stage("saving the model")
    save_full(model, training.base_folder, folder.model, world, fence)
    training.proofs.append(
        world.from_main(lambda: prove_full_learned(folder.model, training.base_folder))
    )
