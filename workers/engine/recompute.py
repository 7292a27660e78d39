"""Recomputed layers: gradient checkpointing (arXiv 1604.06174) on exactly the planned ones.

Which ones: studio.domain.recompute_plan. transformers' own mechanism does it: each decoder layer
is a GradientCheckpointingLayer with a flag of its own, read at every forward pass in training mode.
Not covered: activations moved to the machine's memory, recomputing parts of a layer.
"""

from collections.abc import Collection

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from studio.domain.budget import CONTEXT_BYTES
from studio.domain.outcome import ExitCode
from studio.errors import EngineError
from workers.engine.lora import base_of


def apply_recompute(model: PeftModel | PreTrainedModel, layers: Collection[int]) -> None:
    """Have some decoder layers computed twice instead of keeping their activations.

    May be called again with other layers, and before or after FSDP2 shares the model out.

    Args:
        model: Base and adapter, or a base alone.
        layers: Numbers of the layers, from 0; all others keep their activations.

    Raises:
        EngineError: The model has no layer of that number.
    """
    base = base_of(model) if isinstance(model, PeftModel) else model
    there = decoder_layers(model)
    missing = sorted(set(layers) - set(range(len(there))))
    if missing:
        raise EngineError(
            f"Layer {missing[0]} cannot be recomputed: the model has {len(there)} layers, from 0.",
            "This is a fault of the studio; see log.txt.",
            code=ExitCode.UNEXPECTED,
        )
    if not layers:
        base.activation_checkpointing_disable()  # type: ignore[no-untyped-call]
        return
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # Only reentrant checkpoints need an input that requires a gradient. With one, everything below
    # the first LoRA would be kept and differentiated for nothing.
    base.disable_input_require_grads()  # type: ignore[no-untyped-call]
    for number, layer in enumerate(there):
        layer.gradient_checkpointing = number in layers


def measured_layers(model: PeftModel | PreTrainedModel) -> list[int]:
    """Return the numbers of the layers that are recomputed in training mode."""
    return [
        number for number, layer in enumerate(decoder_layers(model)) if layer.gradient_checkpointing
    ]


def decoder_layers(model: PeftModel | PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the decoder layers in their order.

    Raises:
        EngineError: They are of a class that transformers cannot recompute.
    """
    base = base_of(model) if isinstance(model, PeftModel) else model
    layers: nn.ModuleList = base.get_decoder().layers  # type: ignore[no-untyped-call]
    found = [layer for layer in layers if isinstance(layer, GradientCheckpointingLayer)]
    if len(found) < len(layers):
        raise EngineError(
            f"{type(base).__name__} has layers that cannot be recomputed.",
            "Set recompute to none.",
            "train.recompute",
        )
    return found


def card_bytes(device: torch.device) -> int | None:
    """Return the memory that a run may fill on a card, before it has taken any; None on a CPU.

    What other processes hold is not there for this one.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    # Asking made this process's CUDA context, which the Budget counts.
    return min(total, free + CONTEXT_BYTES)
