"""Proof of coverage: how much of the base is really in 4 bits, by class of module.

Before loading it is told from the configuration, on the meta device; afterwards it is measured on
the weights in memory, and both must agree weight for weight.
"""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.functional import QuantState
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from studio.domain.proof import Proof
from workers.engine.quantize import EXPERT_WEIGHTS, SIXTEEN_BIT, nf4_states

Method = Literal["qlora", "lora", "full"]
Counts = dict[str, int]
Classes = dict[str, Counts]


def expect_coverage(folder: Path, method: Method) -> Proof:
    """Tell from the configuration which share of a base will be in 4 bits, before it is loaded.

    Args:
        folder: A Hugging Face folder; only its config.json is read.
        method: qlora brings linear layers and routed experts to 4 bits.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    classes = _expected(config, method)
    total = _total(classes)
    if method != "qlora":
        summary = f"None of the {total['parameters']:,} weights of the base will be in 4 bits."
    else:
        summary = (
            f"{_share(total):.1%} of the {total['parameters']:,} weights of the base will be in "
            "4 bits."
        )
    details = {"expected": classes, "share_expected": _share(total)}
    return Proof(name="coverage", passed=None, summary=summary, details=details)


def prove_coverage(model: PreTrainedModel, method: Method) -> Proof:
    """Measure the share of the base weights that is really in 4 bits, by class of module.

    Args:
        model: The base, before it is wrapped with a LoRA or shared out among ranks.
        method: For lora and full the Proof only informs.
    """
    classes, left_out = _measured(model)
    total = _total(classes)
    expected = _expected(model.config, method)
    size = f"{total['bytes'] / 2**20:,.1f} MiB in memory"
    details: dict[str, Any] = {
        "classes": classes,
        "expected": expected,
        "total": total,
        "share_4bit": _share(total),
        "share_expected": _share(_total(expected)),
        "left_in_16bit": left_out,
    }
    if method != "qlora":
        dtypes = _dtypes(model)
        summary = (
            f"All weights train; they are loaded in {dtypes}: {size}."
            if method == "full"
            else f"The base is held in {dtypes}; {size}."
        )
        return Proof(name="coverage", passed=None, summary=summary, details=details)
    summary = f"{_share(total):.1%} of the base weights are in 4 bits; {size}."
    short = _short_of(expected, classes)
    if short or left_out:
        summary = (
            f"Only {summary} By the configuration it should be "
            f"{_share(_total(expected)):.1%}; not in 4 bits: {', '.join(left_out[:3])}"
            f"{f' and {len(left_out) - 3} more' if len(left_out) > 3 else ''}."
        )
    passed = not short and not left_out and total["parameters_4bit"] > 0
    return Proof(name="coverage", passed=passed, summary=summary, details=details)


def _dtypes(model: nn.Module) -> str:
    """Return what the weights are held in, the most frequent first, as in `float32`."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + parameter.numel()
    return " and ".join(sorted(sizes, key=lambda name: -sizes[name]))


def _measured(model: nn.Module) -> tuple[Classes, list[str]]:
    """Return what is in memory, and the weights that should be in 4 bits and are not."""
    classes: Classes = {}
    left_out = []
    # A tied head is the embeddings' own tensor: it is counted once.
    seen: set[int] = set()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            counts = classes.setdefault(type(module).__name__, _nothing())
            state = _state_of(module, leaf, parameter)
            if state is not None:
                _add(counts, parameter, state)
                continue
            counts["parameters"] += parameter.numel()
            counts["bytes"] += parameter.numel() * parameter.element_size()
            if _belongs_in_4bit(module, f"{path}.{leaf}"):
                left_out.append(f"{path}.{leaf}")
    return classes, left_out


def _state_of(module: nn.Module, leaf: str, parameter: nn.Parameter) -> QuantState | None:
    """Return how a weight was quantised, if it is there in 4 bits: two weights to a byte."""
    state: QuantState | None = nf4_states(module).get(leaf, vars(parameter).get("quant_state"))
    if state is None:
        return None
    num_bytes = parameter.numel() * parameter.element_size()
    return state if 2 * num_bytes == math.prod(state.shape) else None


def _belongs_in_4bit(module: nn.Module, name: str) -> bool:
    if name.endswith(EXPERT_WEIGHTS):
        return True
    is_linear = isinstance(module, nn.Linear) and name.endswith(".weight")
    return is_linear and not name.removesuffix(".weight").endswith(SIXTEEN_BIT)


def _expected(config: PreTrainedConfig, method: Method) -> Classes:
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    classes: Classes = {}
    seen: set[int] = set()
    for path, module in skeleton.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_quantised = method == "qlora" and _belongs_in_4bit(module, f"{path}.{leaf}")
            kind = type(module).__name__
            name = "Linear4bit" if is_quantised and kind == "Linear" else kind
            counts = classes.setdefault(name, {"parameters": 0, "parameters_4bit": 0})
            counts["parameters"] += parameter.numel()
            counts["parameters_4bit"] += parameter.numel() * is_quantised
    return classes


def _short_of(expected: Classes, classes: Classes) -> list[str]:
    """Return the classes with fewer weights in 4 bits than the configuration lets expect."""
    return [
        name
        for name, counts in expected.items()
        if counts["parameters_4bit"] != classes.get(name, _nothing())["parameters_4bit"]
    ]


def _total(classes: Classes) -> Counts:
    total: Counts = {}
    for counts in classes.values():
        for key, value in counts.items():
            total[key] = total.get(key, 0) + value
    return total


def _share(total: Counts) -> float:
    return total["parameters_4bit"] / total["parameters"]


def _nothing() -> Counts:
    return {"parameters": 0, "parameters_4bit": 0, "bytes": 0, "bytes_4bit": 0}


def _add(counts: Counts, parameter: nn.Parameter, state: QuantState) -> None:
    # The constants of quantisation count too.
    parts = (part for part in state.as_dict(packed=True).values())
    num_bytes = parameter.numel() * parameter.element_size()
    num_bytes += sum(part.numel() * part.element_size() for part in parts)
    counts["parameters"] += math.prod(state.shape)
    counts["parameters_4bit"] += math.prod(state.shape)
    counts["bytes"] += num_bytes
    counts["bytes_4bit"] += num_bytes
