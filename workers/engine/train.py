"""One training run, top to bottom: build, loop, step, stop.

Reads spec.json and the Datasets of a run folder, writes all its other files.
Not covered: more than one card, packing, resuming (load_checkpoint is there, no field asks for it).
"""

import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from studio.disk import RunFolder
from studio.domain import metrics
from studio.domain.proof import Proof
from studio.domain.spec import JobSpec, parse_spec
from studio.errors import EngineError, InputError
from studio.tokens.order import count_steps, epoch_ends, step_order
from workers.engine.batches import count_supervised, micro_batches
from workers.engine.checkpoint import save_adapter, save_checkpoint
from workers.engine.coverage import prove_coverage
from workers.engine.data import Examples, read_data
from workers.engine.evaluate import batch_loss, evaluation_loss
from workers.engine.lora import add_adapter
from workers.engine.lora_proofs import prove_learned, prove_targets
from workers.engine.model import find_base, load_base, load_tokenizer
from workers.engine.optim import build_optimizer, learning_rate_at, set_learning_rate
from workers.engine.proofs import prove_loss, prove_mask
from workers.engine.report import Reporter

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Training:
    """All that the acts share.

    Attributes:
        evaluation: What is measured and never trained on; None when nothing is.
        losses: Loss of each step so far: also how many steps are done.
        eval_losses: Loss on `evaluation`, before the first step and after each epoch.
    """

    folder: RunFolder
    spec: JobSpec
    report: Reporter
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    evaluation: Examples | None
    model: PeftModel
    optimizer: torch.optim.Optimizer
    total_steps: int
    proofs: list[Proof]
    losses: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)


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


def build(folder: RunFolder) -> Training:
    """Read the order, check it against data and machine, and load all that the loop needs."""
    report = Reporter(folder)
    report.begin()
    report.go_on(-1)
    spec = _read_spec(folder)
    if spec.method == "auto" or spec.method == "full":
        raise EngineError(
            f"The method {spec.method} is not supported yet.", "Choose qlora or lora."
        )
    accelerator = _accelerator(spec.train.num_gpus)
    report.stage("finding the base model", spec.model.id)
    base_folder = find_base(spec.model, folder.home)
    tokenizer = load_tokenizer(base_folder)
    data = read_data(folder, spec, base_folder, report.stage)
    report.stage("proving the mask")
    proofs = [prove_mask(data.training, tokenizer, spec.data.reading)]
    report.proofs(proofs)
    report.stage("loading the base model", spec.model.id)
    base = load_base(base_folder, method=spec.method, device=accelerator.device)
    proofs.append(prove_coverage(base, spec.method))
    report.proofs(proofs)
    report.stage("adding the adapter")
    torch.manual_seed(spec.train.seed)
    model = add_adapter(base, spec.lora)
    proofs.insert(0, prove_targets(model, spec.lora))
    report.proofs(proofs)
    _refuse_failed(proofs)
    if spec.train.recompute != "none":
        base.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    # The model is not prepared: at world size 1 accelerate would only wrap it for gradient
    # exchange with nobody.
    optimizer = accelerator.prepare(build_optimizer(model.named_parameters(), spec.optim))
    per_epoch = data.training.per_epoch
    total_steps = count_steps(per_epoch, spec.batch, spec.train)
    log.info("%d examples an epoch, %d steps on %s", per_epoch, total_steps, accelerator.device)
    return Training(
        folder=folder,
        spec=spec,
        report=report,
        accelerator=accelerator,
        tokenizer=tokenizer,
        examples=data.training,
        evaluation=data.evaluation,
        model=model.train(),
        optimizer=optimizer,
        total_steps=total_steps,
        proofs=proofs,
    )


def loop(training: Training, wish: StopWish) -> None:
    """Take steps until the last one, or until somebody asks to stop."""
    spec = training.spec
    examples = training.examples
    ends = epoch_ends(examples.per_epoch, spec.batch, spec.train)
    evaluate(training)
    training.report.stage("training", f"{training.total_steps} steps")
    for indices in step_order(examples.lengths, spec.batch, spec.train, parts=examples.parts):
        step(training, indices)
        if wish.is_there:
            return
        if len(training.losses) in ends:
            evaluate(training)


def evaluate(training: Training) -> None:
    """Measure the loss on what is never trained on, and report it at the present step."""
    if training.evaluation is None:
        return
    training.report.stage("evaluating", f"{len(training.evaluation)} examples")
    loss = evaluation_loss(
        training.model,
        training.evaluation,
        micro_batch_size=training.spec.batch.micro_batch_size,
        pad_token_id=_pad_token_id(training),
    )
    training.eval_losses.append(loss)
    step = len(training.losses)
    training.report.step(step, training.total_steps, {metrics.EVAL_LOSS: loss})
    training.report.stage("training", f"{training.total_steps} steps")


def step(training: Training, indices: Sequence[int]) -> None:
    """Take one optimizer step on some examples and report it.

    Args:
        training: What is trained.
        indices: Places of the examples in `training.examples`.

    Raises:
        EngineError: Loss or gradient is not finite; the weights are left as they were.
    """
    start = time.perf_counter()
    spec, number = training.spec, len(training.losses) + 1
    model, accelerator, optimizer = training.model, training.accelerator, training.optimizer
    examples = [training.examples[index] for index in indices]
    num_supervised = count_supervised(examples)
    loss = torch.zeros((), device=accelerator.device)
    size, pad = spec.batch.micro_batch_size, _pad_token_id(training)
    for batch in micro_batches(examples, size, pad):
        share = batch_loss(model, batch.to(accelerator.device), num_supervised)
        accelerator.backward(share)
        loss += share.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), spec.optim.max_grad_norm)
    _refuse_not_finite(training, float(loss), float(norm), indices)
    rate = learning_rate_at(spec.optim, number, training.total_steps)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    training.losses.append(float(loss))
    seconds = time.perf_counter() - start
    values = {
        metrics.LOSS: float(loss),
        metrics.LEARNING_RATE: rate,
        metrics.GRAD_NORM: float(norm),
        metrics.STEP_SECONDS: seconds,
        metrics.TOKENS_PER_SECOND: sum(len(example.tokens) for example in examples) / seconds,
        "supervised_tokens": float(num_supervised),
    }
    training.report.step(number, training.total_steps, values)


def stop(training: Training) -> None:
    """Save Checkpoint and Adapter, measure what was learned, and say how the run ended."""
    spec, done = training.spec, len(training.losses)
    training.report.stage("saving the adapter")
    save_checkpoint(
        training.folder, training.model, training.optimizer, step=done, base_id=spec.model.id
    )
    save_adapter(training.model, spec.model.id, training.folder.adapter)
    training.proofs += [
        prove_learned(training.model, spec.lora),
        prove_loss(training.losses, training.eval_losses),
    ]
    training.report.proofs(training.proofs)
    is_finished = done == training.total_steps
    training.report.result(
        "FINISHED" if is_finished else "STOPPED",
        step=done,
        total_steps=training.total_steps,
        trainable_parameters=training.model.num_parameters(only_trainable=True),
    )
    training.report.stage("finished" if is_finished else "stopped", f"step {done}")
    training.accelerator.end_training()


def _read_spec(folder: RunFolder) -> JobSpec:
    try:
        return parse_spec(json.loads(folder.spec.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The run folder {folder.path} has no readable spec.json: {error}.",
            "Start the run from the studio, or write a JobSpec there.",
        ) from error


def _accelerator(num_gpus: int) -> Accelerator:
    if num_gpus > 1:
        raise EngineError(
            f"The run asks for {num_gpus} GPUs; more than one is not supported yet.",
            "Set GPUs to 1, or to 0 for a tiny model on the CPU.",
            "train.num_gpus",
        )
    if num_gpus == 1 and not torch.cuda.is_available():
        raise EngineError(
            "The run asks for 1 GPU, but PyTorch finds no CUDA GPU on this machine.",
            "Set GPUs to 0 (tiny models only), or start a worker on a machine with a GPU.",
            "train.num_gpus",
        )
    # No autocast: the base is bfloat16 on CUDA already, and the adapter is float32 on purpose.
    return Accelerator(cpu=num_gpus == 0, mixed_precision="no")


def _refuse_failed(proofs: list[Proof]) -> None:
    """Stop before the first step where training would be for nothing."""
    for proof in proofs:
        if proof.name in ("targets", "mask") and proof.passed is False:
            raise EngineError(proof.summary, f"See the Proof {proof.name!r} of the run.")


def _pad_token_id(training: Training) -> int:
    return int(training.tokenizer.pad_token_id or 0)


def _refuse_not_finite(
    training: Training, loss: float, norm: float, indices: Sequence[int]
) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
    places = sorted({training.examples.place_of(index) for index in indices})
    lines = ", ".join(training.examples.name_of(place) for place in places)
    raise EngineError(
        f"The {what} at step {len(training.losses) + 1}; the weights were left as they were "
        f"before it. The step held these lines of the dataset: {lines}.",
        "Lower the learning rate; if it happens at step 1, look at those lines.",
        "optim.learning_rate",
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
