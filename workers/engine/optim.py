"""Optimizer and schedule; with studio/domain/spec.py the only files that name a learning rate."""

import math
from collections.abc import Iterable

import bitsandbytes
import torch
from torch import nn

from studio.domain.spec import OptimSpec


def build_optimizer(parameters: Iterable[nn.Parameter], optim: OptimSpec) -> torch.optim.Optimizer:
    """Return the optimizer for the parameters that train (AdamW: arXiv 1711.05101)."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    match optim.optimizer:
        case "adamw":
            return torch.optim.AdamW(
                trainable, lr=optim.learning_rate, weight_decay=optim.weight_decay, fused=True
            )
        case "adamw_8bit":
            return _eight_bit("AdamW8bit", trainable, optim)
        case "paged_adamw_8bit":
            return _eight_bit("PagedAdamW8bit", trainable, optim)
        case "ademamix_8bit":
            return _eight_bit("AdEMAMix8bit", trainable, optim)


def _eight_bit(name: str, trainable: list[nn.Parameter], optim: OptimSpec) -> torch.optim.Optimizer:
    build = vars(bitsandbytes.optim)[name]  # bitsandbytes has no types
    optimizer: torch.optim.Optimizer = build(
        trainable, lr=optim.learning_rate, weight_decay=optim.weight_decay
    )
    return optimizer


def learning_rate_at(optim: OptimSpec, step: int, total_steps: int) -> float:
    """Return the learning rate of a step.

    It rises in a straight line over the warm-up, then falls to zero behind the last step, along
    half a cosine (arXiv 1608.03983, without restarts) or a straight line, or stays.

    Args:
        optim: Peak, schedule and warm-up.
        step: From 1 to `total_steps`.
        total_steps: Steps of the run.
    """
    warmup_steps = math.ceil(optim.warmup_ratio * total_steps)
    if step <= warmup_steps:
        return optim.learning_rate * step / warmup_steps
    done = (step - 1 - warmup_steps) / (total_steps - warmup_steps)
    match optim.schedule:
        case "cosine":
            return optim.learning_rate * (1 + math.cos(math.pi * done)) / 2
        case "linear":
            return optim.learning_rate * (1 - done)
        case "constant":
            return optim.learning_rate
        case "wsd":
            return optim.learning_rate * min(1.0, (1 - done) / optim.decay_ratio)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
