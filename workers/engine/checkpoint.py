"""Checkpoints: all that a run needs to go on as if it had never stopped.

A folder step-000100 holds adapter/ (PEFT's own layout), optimizer.pt, rng.pt and state.json.
It appears whole. Nothing in it is a pickle of code: the .pt files load with weights_only.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from studio.disk import RunFolder
from studio.errors import EngineError, disk_errors
from studio.whole import whole_folder

VERSION = 1


def save_adapter(model: PeftModel, base_id: str, folder: Path) -> None:
    """Write the Adapter in PEFT's own layout, whole or not at all; replace an older one.

    Args:
        model: Its active adapter is saved.
        base_id: What adapter_config.json names as its base: the id of the ModelRef, not a path
            on this machine.
        folder: Where the Adapter shall stand.

    Raises:
        MachineError: The disk is full or read-only.
    """
    model.peft_config[model.active_adapter].base_model_name_or_path = base_id
    # Without save_embedding_layers=False PEFT asks the hub whether the vocabulary was resized.
    _appear_whole(
        folder, lambda inner: model.save_pretrained(str(inner), save_embedding_layers=False)
    )


def save_checkpoint(
    run: RunFolder, model: PeftModel, optimizer: torch.optim.Optimizer, *, step: int, base_id: str
) -> Path:
    """Save a Checkpoint after `step` steps.

    Returns:
        Its folder.

    Raises:
        MachineError: The disk is full or read-only.
    """

    def write(inner: Path) -> None:
        save_adapter(model, base_id, inner / "adapter")
        torch.save(optimizer.state_dict(), inner / "optimizer.pt")
        torch.save(_rng_state(), inner / "rng.pt")
        state = {"version": VERSION, "step": step}
        (inner / "state.json").write_text(json.dumps(state), encoding="utf-8")

    folder = run.checkpoint(step)
    _appear_whole(folder, write)
    return folder


def load_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> int:
    """Bring model, optimizer and random numbers back to where the Checkpoint was saved.

    Args:
        folder: A Checkpoint.
        model: Wrapped as it was; its adapter weights are overwritten.
        optimizer: Built as it was.

    Returns:
        Steps done: the cursor.

    Raises:
        EngineError: The Checkpoint is incomplete or belongs to another model.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        found: Any = set_peft_model_state_dict(model, weights)
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        rng = torch.load(folder / "rng.pt", weights_only=True)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"The Checkpoint in {folder} cannot be loaded: {error}.", "Start the run anew."
        ) from error
    if found.unexpected_keys:
        raise EngineError(
            f"The Checkpoint in {folder} is of another model: {found.unexpected_keys[0]}.",
            "Choose a Checkpoint of this model and these LoRA targets.",
        )
    torch.set_rng_state(rng["cpu"])
    if rng["cuda"]:
        torch.cuda.set_rng_state_all(rng["cuda"])
    return int(state["step"])


def _rng_state() -> dict[str, torch.Tensor | list[torch.Tensor]]:
    # The order of examples needs none: it is a function of seed and step.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _appear_whole(folder: Path, write: Callable[[Path], object]) -> None:
    with disk_errors(f"saving {folder.name}"), whole_folder(folder) as inner:
        write(inner)
