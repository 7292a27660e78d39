"""Proof of coverage: how much of the base is really in 4 bits, by class of module."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from bitsandbytes.nn import Params4bit  # type: ignore[attr-defined]
from torch import nn
from transformers import PreTrainedModel

from studio.domain.proof import Proof
from workers.engine.model import SIXTEEN_BIT


def prove_coverage(model: PreTrainedModel, method: Literal["qlora", "lora"]) -> Proof:
    """Measure the share of the base weights that is really in 4 bits, by class of module.

    Args:
        model: The base, before it is wrapped with a LoRA.
        method: For lora the Proof only informs.
    """
    classes: dict[str, dict[str, int]] = {}
    left_out = []
    for name, module in model.named_modules():
        entry = classes.setdefault(type(module).__name__, _no_weights())
        for parameter in module.parameters(recurse=False):
            _add(entry, parameter)
        if type(module) is nn.Linear and not name.endswith(SIXTEEN_BIT):
            left_out.append(name)
    classes = {name: entry for name, entry in classes.items() if entry["parameters"]}
    total = {key: sum(entry[key] for entry in classes.values()) for key in _no_weights()}
    experts = sum(
        entry["parameters"] - entry["parameters_4bit"]
        for name, entry in classes.items()
        if name.endswith("Experts")
    )
    share = total["parameters_4bit"] / total["parameters"]
    expert_share = experts / total["parameters"]
    summary = (
        f"{share:.0%} of the base weights are in 4 bits; "
        f"{total['bytes'] / 2**20:,.1f} MiB in memory."
    )
    if expert_share > 0.5 and method == "qlora":
        summary = (
            f"Only {summary} The routed experts hold {expert_share:.0%} of the weights and stay "
            "in 16 bits, because bitsandbytes quantises linear layers only."
        )
    elif method == "qlora" and left_out:
        summary += f" {len(left_out)} linear layers stay in 16 bits, as {left_out[0]}."
    elif method == "lora":
        summary = f"The base stays in 16 bits; {total['bytes'] / 2**20:,.1f} MiB in memory."
    passed = None if method == "lora" else share > 0 and not left_out and expert_share <= 0.5
    details = {
        "classes": classes,
        "total": total,
        "share_4bit": share,
        "share_experts_16bit": expert_share,
        "linear_layers_in_16bit": left_out,
    }
    return Proof(name="coverage", passed=passed, summary=summary, details=details)


def _no_weights() -> dict[str, int]:
    return {"parameters": 0, "parameters_4bit": 0, "bytes": 0, "bytes_4bit": 0}


def _add(entry: dict[str, int], parameter: nn.Parameter) -> None:
    if not isinstance(parameter, Params4bit):
        entry["parameters"] += parameter.numel()
        entry["bytes"] += parameter.numel() * parameter.element_size()
        return
    # Two weights share a byte; the constants of quantisation count too.
    state = parameter.quant_state
    num_bytes = parameter.numel() * parameter.element_size()
    num_bytes += sum(t.numel() * t.element_size() for t in _tensors(state.as_dict(packed=True)))
    entry["parameters"] += math.prod(state.shape)
    entry["parameters_4bit"] += math.prod(state.shape)
    entry["bytes"] += num_bytes
    entry["bytes_4bit"] += num_bytes


def _tensors(values: dict[str, Any]) -> Iterable[torch.Tensor]:
    return (value for value in values.values() if isinstance(value, torch.Tensor))
