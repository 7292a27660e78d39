"""Optimizer and schedule; with studio/domain/spec.py the only files that name a learning rate."""

import math
from collections.abc import Iterable
from typing import Any

import bitsandbytes
import torch
from torch import nn

from studio.domain.spec import OptimSpec

# How much faster a group of parameters learns than the learning rate says.
_RATIO = "learning_rate_ratio"


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimSpec
) -> torch.optim.Optimizer:
    """Return the optimizer for the parameters that train.

    AdamW: arXiv 1711.05101; its 8-bit form: arXiv 2110.02861; AdEMAMix: arXiv 2409.03137. With a
    LoRA+ ratio the matrices B learn that much faster than all others (arXiv 2402.12354).

    Args:
        named_parameters: As a module's own method yields them; what is frozen is left out.
        optim: Which optimizer, and its rates.
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    fast = [p for name, p in trainable if _is_b(name)] if optim.loraplus_ratio > 1 else []
    chosen = {id(p) for p in fast}
    slow = [p for _, p in trainable if id(p) not in chosen]
    groups = [
        {"params": parameters, "lr": optim.learning_rate * ratio, _RATIO: ratio}
        for parameters, ratio in ((slow, 1.0), (fast, optim.loraplus_ratio))
        if parameters
    ]
    match optim.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, weight_decay=optim.weight_decay, fused=True)
        case "adamw_8bit":
            return _eight_bit("AdamW8bit", groups, optim)
        case "paged_adamw_8bit":
            return _eight_bit("PagedAdamW8bit", groups, optim)
        case "ademamix_8bit":
            return _eight_bit("AdEMAMix8bit", groups, optim)


def _is_b(name: str) -> bool:
    return ".lora_B" in name or ".lora_embedding_B" in name


def _eight_bit(name: str, groups: list[dict[str, Any]], optim: OptimSpec) -> torch.optim.Optimizer:
    build = vars(bitsandbytes.optim)[name]  # bitsandbytes has no types
    optimizer: torch.optim.Optimizer = build(groups, weight_decay=optim.weight_decay)
    return optimizer


def learning_rate_at(optim: OptimSpec, step: int, total_steps: int) -> float:
    """Return the learning rate of a step.

    It rises in a straight line over the warm-up, then falls to zero behind the last step, along
    half a cosine (arXiv 1608.03983, without restarts) or a straight line, or stays. wsd stays and
    falls in a straight line over the last share of the steps (arXiv 2404.06395, section 4).

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
            decay_steps = math.ceil(optim.decay_ratio * total_steps)
            return optim.learning_rate * min(1.0, (total_steps - step + 1) / decay_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of the next step; B of LoRA+ learns faster by its ratio."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[_RATIO]
