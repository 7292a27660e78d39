"""Build a run: read the order, check it against data and machine, load all that the loop needs.

What can be refused is refused in the order of its cost: spec, machine, model files, data, kernels,
memory; only then are weights loaded.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.disk import Home, RunFolder
from studio.domain.architecture import read_architecture
from studio.domain.outcome import ExitCode
from studio.domain.proof import Proof
from studio.domain.recompute_plan import Choice, choose_method
from studio.domain.spec import JobSpec, parse_spec
from studio.domain.train_spec import BatchSpec
from studio.errors import EngineError, InputError
from studio.tokens.order import Order
from workers.engine.batches import collate
from workers.engine.beginning import Begun, begin
from workers.engine.checkpoint import Progress
from workers.engine.coverage import expect_coverage, prove_coverage
from workers.engine.data import Examples, RunData, read_data
from workers.engine.full import compute_dtype, train_all
from workers.engine.kernels import needed_by, preflight, prove_kernels, refuse_unfit
from workers.engine.leak import prove_leak
from workers.engine.lora import add_adapter
from workers.engine.lora_proofs import prove_targets
from workers.engine.model import find_base, load_base, load_tokenizer
from workers.engine.optim import build_optimizer
from workers.engine.parallel import Root, refuse_optimizer, wrap
from workers.engine.proofs import prove_all_train, prove_mask
from workers.engine.quantized_cache import QuantizedCache
from workers.engine.recompute import apply_recompute, card_bytes
from workers.engine.report import Reporter
from workers.engine.varlen import disable_packing, enable_packing
from workers.engine.world import World, open_world

log = logging.getLogger(__name__)

# A row of several examples is looked for in so many steps.
_STEPS_TO_TEST = 8


@dataclass(kw_only=True, slots=True)
class Training:
    """All that the acts of a run share.

    Attributes:
        base_folder: What the base was loaded from.
        evaluation: What is measured and never trained on; None when nothing is.
        batch: As in the spec, but without packing where the leak Proof failed.
        model: Base and adapter, or the base alone when all of it trains.
        root: What losses, evaluation and samples are called through, on any number of ranks.
        progress: Steps done and what they measured; also what a Checkpoint keeps.
        seconds: Of each step taken by this process.
        tokens: Real tokens of each step taken by this process.
        saved_step: Step of a Checkpoint that holds all there is to save; None when none does.
        saved_at: When the latest Checkpoint was saved, or training began; monotonic seconds.
        silent_steps: How many of the latest steps had a gradient of exactly zero.
    """

    folder: RunFolder
    spec: JobSpec
    world: World
    report: Reporter
    base_folder: Path
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    evaluation: Examples | None
    batch: BatchSpec
    order: Order
    model: PeftModel | PreTrainedModel
    root: Root
    optimizer: torch.optim.Optimizer
    proofs: list[Proof]
    progress: Progress
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    saved_step: int | None = None
    saved_at: float = field(default_factory=time.monotonic)
    silent_steps: int = 0

    @property
    def pad_token_id(self) -> int:
        """What fills the rest of a padded row."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def best(self) -> int | None:
        """Step of the best evaluation of what was trained; None where there is none."""
        trained = [found for found in self.progress.evaluations if found[0]]
        return min(trained, key=lambda found: found[1])[0] if trained else None


def build(folder: RunFolder) -> Training:
    """Build a run, as far as its latest Checkpoint if it has one.

    Raises:
        InputError: The spec, the dataset or the model is wrong.
        EngineError: The run cannot start; the message says why.
        MachineError: Disk or memory is full.
    """
    spec = _read_spec(folder)
    world = open_world(spec.train)
    report = Reporter(folder, speaks=world.is_main)
    report.begin()
    refuse_optimizer(spec.optim, world)
    report.stage("finding the base model", spec.model.id)
    base_folder = world.from_main(lambda: find_base(spec.model, folder.home))
    tokenizer = load_tokenizer(base_folder)
    data = _read_data(folder, spec, base_folder, world, report)
    proofs = _Proofs(report, world)
    report.stage("proving the mask")
    proofs.add(lambda: prove_mask(data.training, tokenizer, spec.data.reading))
    config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    _try_kernels(spec, config, proofs)
    choice = choose_method(config, spec, card_bytes(world.device))
    log.info("Method %s, %s. %s", choice.method, choice.budget.plan, choice.reason)
    report.stage("loading the base model", spec.model.id)
    model = _load(spec, base_folder, choice, folder.home, proofs)
    pad = int(tokenizer.pad_token_id or 0)
    batch, order = _plan_steps(spec, data.training, model, pad, proofs)
    root = wrap(model, world, compute_dtype=compute_dtype(spec, world))
    optimizer = build_optimizer(model.named_parameters(), spec.optim)
    world.seed_training(spec.train.seed)
    begun = Begun(
        model=model, optimizer=optimizer, world=world, report=report, base_id=spec.model.id
    )
    progress, is_saved = begin(folder, begun, order.total_steps)
    _refuse_other_order(progress, batch)
    progress.notes["packing"] = batch.packing
    log.info("%d steps, %d of them done, on %s", order.total_steps, progress.step, world.device)
    return Training(
        folder=folder,
        spec=spec.model_copy(update={"method": choice.method}),
        world=world,
        report=report,
        base_folder=base_folder,
        tokenizer=tokenizer,
        examples=data.training,
        evaluation=data.evaluation,
        batch=batch,
        order=order,
        model=model.train(),
        root=root,
        optimizer=optimizer,
        proofs=proofs.found,
        progress=progress,
        saved_step=progress.step if is_saved else None,
    )


class _Proofs:
    """Proofs as they are measured; one that fails where training would be for nothing stops."""

    def __init__(self, report: Reporter, world: World) -> None:
        self.found: list[Proof] = []
        self.report, self.world = report, world

    def add(self, prove: Callable[[], Proof]) -> Proof:
        """Measure on rank 0, tell all ranks, and write it."""
        proof = self.world.from_main(prove)
        self.found.append(proof)
        self.report.proofs(self.found)
        if proof.name in ("targets", "mask") and proof.passed is False:
            code = ExitCode.DATA if proof.name == "mask" else ExitCode.INPUT
            hint = f"See the Proof {proof.name!r} of the run."
            raise EngineError(proof.summary, hint, code=code)
        return proof


def _read_spec(folder: RunFolder) -> JobSpec:
    try:
        return parse_spec(json.loads(folder.spec.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The run folder {folder.path} has no readable spec.json: {error}.",
            "Start the run from the studio, or write a JobSpec there.",
        ) from error


def _read_data(
    folder: RunFolder, spec: JobSpec, base_folder: Path, world: World, report: Reporter
) -> RunData:
    if world.size > 1:
        # Rank 0 tokenises; the others open what it has written.
        world.from_main(lambda: bool(read_data(folder, spec, base_folder, report.stage)))
    return read_data(folder, spec, base_folder, report.stage)


def _try_kernels(spec: JobSpec, config: dict[str, object], proofs: _Proofs) -> None:
    proofs.report.stage("trying the kernels")
    # On every rank: what is lifted or compiled is so in this process alone.
    kernels = preflight(proofs.world.device)
    needed = needed_by(spec, read_architecture(config))
    proofs.add(lambda: prove_kernels(kernels, needed))
    refuse_unfit(kernels, needed=needed, accept_slow=spec.train.accept_slow_kernels)


def _load(
    spec: JobSpec, base_folder: Path, choice: Choice, home: Home, proofs: "_Proofs"
) -> PeftModel | PreTrainedModel:
    """Load the base and let the adapter, or all of it, train."""
    world = proofs.world
    proofs.add(lambda: expect_coverage(base_folder, choice.method))
    cache = QuantizedCache(folder=home.quantized) if choice.method == "qlora" else None
    storage = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    base = world.main_first(
        lambda: load_base(
            base_folder,
            method=choice.method,
            device=world.device,
            cache=cache,
            storage=storage if world.size > 1 else torch.uint8,
        )
    )
    proofs.found.pop()  # what was expected stands in the measured one as well
    proofs.add(lambda: prove_coverage(base, choice.method))
    model: PeftModel | PreTrainedModel = base
    if choice.method == "full":
        train_all(base)
        proofs.add(lambda: prove_all_train(base))
    else:
        world.seed_adapter(spec.train.seed)
        model = adapted = add_adapter(base, spec.lora)
        proofs.add(lambda: prove_targets(adapted, spec.lora))
    apply_recompute(model, choice.budget.recomputed)
    return model


def _plan_steps(
    spec: JobSpec,
    examples: Examples,
    model: PeftModel | PreTrainedModel,
    pad_token_id: int,
    proofs: _Proofs,
) -> tuple[BatchSpec, Order]:
    """Return what each step trains on; packing is turned off where examples see each other."""
    batch, order = spec.batch, _order(spec, spec.batch, examples)
    if not batch.packing:
        return batch, order
    said = enable_packing(model)
    log.info("Packed rows: %s", said)
    proofs.report.stage("proving that packed examples do not see each other")
    row = _row_to_test(order)
    device = proofs.world.device
    micro_batch = collate([examples[i] for i in row], pad_token_id, packed=True).to(device)
    proof = proofs.add(lambda: prove_leak(model, micro_batch))
    if proof.passed is not False:
        return batch, order
    log.warning("Packing is turned off: %s", proof.summary)
    disable_packing(model)
    batch = batch.model_copy(update={"packing": False})
    return batch, _order(spec, batch, examples)


def _order(spec: JobSpec, batch: BatchSpec, examples: Examples) -> Order:
    return Order(
        examples.lengths,
        batch,
        spec.train,
        max_length_tokens=spec.data.max_length_tokens,
        parts=examples.parts,
    )


def _row_to_test(order: Order) -> tuple[int, ...]:
    """Return a packed row of the first steps with several examples, if there is one."""
    rows = [row for step in islice(order.steps(), _STEPS_TO_TEST) for row in step]
    return max(rows, key=len)


def _refuse_other_order(progress: Progress, batch: BatchSpec) -> None:
    before = progress.notes.get("packing", batch.packing)
    if before != batch.packing:
        raise EngineError(
            f"The checkpoint was made with packing {'on' if before else 'off'}, and now it is "
            f"{'on' if batch.packing else 'off'}: the steps would hold other examples.",
            "Start the run anew.",
            "batch.packing",
        )
