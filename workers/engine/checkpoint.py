"""Checkpoints: all that a run needs to go on as if it had never stopped.

A folder step-000100 holds
    tensors/*.safetensors   what trains and the optimizer's state, each rank its own part, written
                            by torch.distributed.checkpoint through its safetensors storage
    rng-00000.safetensors   random numbers of a rank
    state.json              steps done, losses, what of the optimizer is no tensor, versions
    manifest.json           size and sha256 of all the others; written last
It appears whole, and is believed only when the manifest agrees. Nothing in it is a pickle: the
usual storage of torch.distributed.checkpoint has a `.metadata` that can run code when it is read;
the safetensors one has none. With several machines the run folder must be one that all of them see.

A run goes on bit for bit on as many ranks as before. On another number weights, optimizer and
cursor are the same, but dropout and noise are drawn anew.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from studio.disk import RunFolder
from studio.domain.outcome import ExitCode
from studio.errors import EngineError, StudioError, disk_errors
from studio.whole import whole_folder
from workers.engine.checkpoint_files import (
    TENSORS,
    flush,
    give_up,
    make_room,
    publish,
    read_state,
    rng_name,
)
from workers.engine.lora import adapter_state
from workers.engine.optimizer_state import fill_state, state_scalars, state_tensors
from workers.engine.parallel import whole_tensor
from workers.engine.world import World
from workers.fence import Fence, fence_of

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is, beside weights and optimizer.

    Attributes:
        step: Steps done: also the cursor of the data, whose order is a function of seed and step.
        base_id: Id of the base weights.
        losses: Loss of each step.
        evaluations: Step and loss of each evaluation.
        notes: Anything else that JSON can hold.
    """

    step: int
    base_id: str
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: RunFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    progress: Progress,
) -> Path:
    """Save a Checkpoint; all ranks call it. One of the same step is kept until this is whole.

    Args:
        run: Where it shall stand.
        model: Its parameters that train are saved.
        optimizer: Of the same parameters.
        world: The processes of the run.
        progress: Steps done, and what was measured.

    Returns:
        Its folder.

    Raises:
        FencedError: The run belongs to another worker by now.
        MachineError: The disk is full or read-only; the Checkpoints before are as they were.
        EngineError: A rank could not write.
    """
    folder, fence = run.checkpoint(progress.step), fence_of(run)
    # Whoever has taken the run over writes into another one, should this process wake up late.
    temporary = folder.parent / f".{folder.name}.{fence.epoch}.part"
    optimizer = _inner(optimizer)
    names = _trainable(model)
    tensors = {f"model|{name}": parameter.detach() for name, parameter in names.items()}
    tensors |= state_tensors(optimizer, names)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    world.from_main(fence.check)
    world.from_main(lambda: make_room(temporary, num_bytes))
    met: Exception | None = None
    try:
        _save_tensors(temporary / TENSORS, tensors)
        _write_rng(temporary / rng_name(world.rank), world)
    # What a rank meets is told to all of them below; alone it would leave the others waiting.
    except Exception as error:  # noqa: BLE001
        met = error
    if any(world.vote(met is not None)):
        _fail_together(temporary, met, num_bytes, world)
    state = {
        "ranks": world.size,
        "progress": asdict(progress),
        "optimizer": state_scalars(optimizer, names),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    world.from_main(lambda: publish(temporary, folder, state, fence))
    return folder


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, world: World
) -> Progress:
    """Bring model, optimizer and random numbers back to where the Checkpoint was saved.

    Args:
        folder: A Checkpoint.
        model: Wrapped as it was, on any number of ranks; what trains is overwritten.
        optimizer: Of the kind that it was; its rates and other choices stay its own. None leaves
            the state of the optimizer out.
        world: The processes of the run, which all call it.

    Returns:
        How far the run was.

    Raises:
        EngineError: The Checkpoint is incomplete, damaged or of another model.
        OtherOptimizerError: It is of another optimizer, whose own state is empty then.
    """
    state = world.from_main(lambda: read_state(folder))
    names = _trainable(model)
    with _reading(folder):
        _load_weights(folder, names)
        if optimizer is not None:
            scalars = state["optimizer"]
            fill_state(_inner(optimizer), names, _stored(folder), scalars, _loader(folder))
        _restore_rng(folder, state["ranks"], world)
    if state["versions"] != (now := {name: version(name) for name in _PACKAGES}):
        log.warning("The Checkpoint was saved with %s, this is %s", state["versions"], now)
    progress = state["progress"]
    progress["evaluations"] = [(int(step), loss) for step, loss in progress["evaluations"]]
    return Progress(**progress)


def load_weights(folder: Path, model: nn.Module, world: World) -> None:
    """Bring only the weights back: those of the best evaluation, for the Adapter.

    Raises:
        EngineError: The Checkpoint is incomplete, damaged or of another model.
    """
    world.from_main(lambda: read_state(folder))
    with _reading(folder):
        _load_weights(folder, _trainable(model))


def save_adapter(model: PeftModel, base_id: str, folder: Path, fence: Fence | None = None) -> None:
    """Write the Adapter in PEFT's own layout, whole or not at all; replace an older one.

    All ranks call it; rank 0 writes.

    Args:
        model: Its active adapter is saved.
        base_id: What adapter_config.json names as its base: the id of the ModelRef, not a path
            on this machine.
        folder: Where the Adapter shall stand.
        fence: Asked before it stands there.

    Raises:
        FencedError: The run belongs to another worker by now.
        MachineError: The disk is full or read-only.
    """
    tensors = {name: whole_tensor(tensor) for name, tensor in adapter_state(model).items()}
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = base_id
    with disk_errors(f"saving {folder.name}"), whole_folder(folder) as inner:
        was_inference, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(inner))
        config.inference_mode = was_inference
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            inner / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        if fence is not None:
            fence.check()


# ---- tensors ----------------------------------------------------------------------------------


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that Accelerate may have wrapped."""
    inner: torch.optim.Optimizer = vars(optimizer).get("optimizer", optimizer)
    return inner


def _save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _plainly():
        save(dict(tensors), storage_writer=writer)


def _load_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    with _plainly():
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))


def _loader(folder: Path) -> Any:
    return lambda tensors: _load_tensors(folder / TENSORS, tensors)


def _stored(folder: Path) -> dict[str, Any]:
    """Return size and dtype of every tensor of a Checkpoint, by key."""
    metadata = HuggingFaceStorageReader(str(folder / TENSORS)).read_metadata()
    return dict(metadata.state_dict_metadata)


def _load_weights(folder: Path, names: Mapping[str, nn.Parameter]) -> None:
    stored = _stored(folder)
    there = {key.split("|", 1)[1]: tuple(stored[key].size) for key in stored if key[:6] == "model|"}
    here = {name: tuple(parameter.shape) for name, parameter in names.items()}
    odd = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if odd:
        said, wanted = (shapes.get(odd[0], "absent") for shapes in (there, here))
        raise EngineError(
            f"The Checkpoint in {folder} is of another model: {odd[0]} is {said} there and "
            f"{wanted} in this run, and {len(odd) - 1} more differ.",
            "Choose a Checkpoint of this model, method and LoRA targets.",
        )
    _load_tensors(folder / TENSORS, {f"model|{name}": p.detach() for name, p in names.items()})


@contextmanager
def _plainly() -> Iterator[None]:
    """Raise what a rank met, not what torch makes of it, which is no Exception.

    torch's warning that there is no process group is silenced: one process needs none.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        met = [failure for failure, _ in error.failures.values() if isinstance(failure, Exception)]
        raise (met[0] if met else RuntimeError(str(error))) from error


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Say in a sentence what a library finds wrong with a Checkpoint."""
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise EngineError(
            f"The Checkpoint in {folder} cannot be loaded: {error}.",
            "Start the run anew.",
            code=ExitCode.UNEXPECTED,
        ) from error


def _fail_together(
    temporary: Path, met: Exception | None, num_bytes: int, world: World
) -> NoReturn:
    """Remove what there is of a Checkpoint and raise what the first rank met, on all of them."""
    said: StudioError | None = None
    world.barrier()  # nobody writes any more
    if met is not None:
        met = give_up(temporary, met, num_bytes)
        said = met if isinstance(met, StudioError) else None
    if world.size > 1 and met is not None and said is None:
        said = EngineError(
            f"Rank {world.rank} could not write its part of the Checkpoint: {met}.",
            "See log.txt.",
            code=ExitCode.UNEXPECTED,
        )
    first = world.first_of(said)
    with disk_errors("saving a Checkpoint"):
        raise first or met or AssertionError("no rank met anything")


# ---- random numbers ---------------------------------------------------------------------------


def _write_rng(path: Path, world: World) -> None:
    # The order of examples needs none: it is a function of seed and step.
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    save_file(states, path)
    flush(path)


def _restore_rng(folder: Path, ranks: int, world: World) -> None:
    if ranks == world.size:
        states = load_file(folder / rng_name(world.rank))
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and world.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], world.device)
        return
    log.warning(
        "The Checkpoint was saved on %d ranks, this run has %d: dropout and noise are drawn anew.",
        ranks,
        world.size,
    )
    first = load_file(folder / rng_name(0))["cpu"].numpy().tobytes()
    digest = hashlib.sha256(first + f"{world.rank} {world.size}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
