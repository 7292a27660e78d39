"""Proofs: what a falling loss does not show, measured on the real model, data and weights.

targets   the layers that carry a LoRA are the selected ones, and nothing else trains
coverage  how much of the base is really in 4 bits
mask      which tokens are supervised, with examples to read; that they are transformers' own
learned   the update B A of every target group is not zero
loss      it fell
"""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from bitsandbytes.nn import Params4bit  # type: ignore[attr-defined]
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.domain.chat_template import readable
from studio.domain.proof import Proof
from studio.domain.reading import Reading
from studio.domain.spec import LoraSpec
from studio.domain.targets import TargetGroup, count_by_group, select, target_modules
from studio.tokens.examples import Example
from workers.engine.data import Examples, conversations_to_compare
from workers.engine.model import SIXTEEN_BIT, base_of, lora_layers

NUM_SHOWN = 3
# Conversations, evenly spread, whose tokens are compared with transformers'.
NUM_COMPARED = 8
# Fewer steps than this say nothing about a trend.
MIN_STEPS = 10


def prove_targets(model: PeftModel, lora: LoraSpec) -> Proof:
    """Compare the layers that carry a LoRA, and all that trains, with what was selected."""
    chosen = select(target_modules(base_of(model).config.to_dict()), lora.targets)
    group_of = {f"model.{module.name}": module.group for module in chosen}
    expected = count_by_group(chosen, lora.rank)
    layers = lora_layers(model)
    modules = dict.fromkeys(expected, 0)
    parameters = dict.fromkeys(expected, 0)
    for name, layer in layers.items():
        if name in group_of:
            modules[group_of[name]] += 1
            parameters[group_of[name]] += _trainable(layer)
    trainable = _trainable(model)
    lost, extra = sorted(group_of.keys() - layers.keys()), sorted(layers.keys() - group_of.keys())
    passed = not lost and not extra and parameters == expected
    passed = passed and trainable == sum(expected.values())
    summary = (
        f"{len(layers)} layers carry a LoRA of {trainable:,} trainable parameters, exactly the "
        f"selected ones."
        if passed
        else f"{len(group_of)} layers with {sum(expected.values()):,} parameters were selected, "
        f"but {len(layers)} layers carry a LoRA and {trainable:,} parameters train."
    )
    groups = {
        group.value: {"modules": modules[group], "parameters": parameters[group]}
        for group in expected
    }
    details = {
        "groups": groups,
        "trainable_parameters": trainable,
        "expected_parameters": sum(expected.values()),
        "missing": lost,
        "unexpected": extra,
    }
    return Proof(name="targets", passed=passed, summary=summary, details=details)


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


def prove_mask(examples: Examples, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> Proof:
    """Count supervised tokens, show examples, and compare our tokens with transformers'.

    Args:
        examples: All that is trained on.
        tokenizer: As transformers loads it from the base's folder.
        reading: What is learned of the thinking.
    """
    num_tokens, num_supervised = int(examples.lengths.sum()), int(examples.supervised.sum())
    empty = int((examples.supervised == 0).sum())
    different, compared = _compare(examples, tokenizer, reading)
    summary = (
        f"{num_supervised:,} of {num_tokens:,} tokens are supervised "
        f"({num_supervised / num_tokens:.1%}), in {len(examples)} examples."
    )
    if empty:
        summary += f" {empty} examples have none."
    left_out = _left_out(examples)
    summary += left_out.pop("summary", "")
    if compared:
        summary += (
            f" The tokens of {len(different)} of {compared} conversations differ from transformers', "
            f"the first is line {different[0]}."
            if different
            else f" The tokens are identical to transformers' on {compared} conversations."
        )
    details = {
        "examples": len(examples),
        "tokens": num_tokens,
        "supervised_tokens": num_supervised,
        "share": num_supervised / num_tokens,
        "empty_examples": empty,
        "compared_with_transformers": compared,
        "different_from_transformers": different,
        **left_out,
        "shown": [
            _shown(examples[index], tokenizer) for index in range(min(NUM_SHOWN, len(examples)))
        ],
    }
    passed = num_supervised > 0 and not different
    return Proof(name="mask", passed=passed, summary=summary, details=details)


def _left_out(examples: Examples) -> dict[str, Any]:
    """Count what truncation takes away, and conversations with nothing to learn."""
    fitted = [source.fitted for source in examples.sources]
    lost = sum(one.lost_tokens for one in fitted)
    empty = sum(len(one.nothing_left()) for one in fitted)
    empty += sum(source.cache.meta.counts.num_unsupervised for source in examples.sources)
    found: dict[str, Any] = {
        "tokens_lost_by_truncation": lost,
        "supervised_tokens_lost_by_truncation": sum(one.lost_supervised for one in fitted),
        "conversations_with_nothing_left": empty,
    }
    if lost:
        found["summary"] = f" Truncation leaves {lost:,} tokens out."
    if empty:
        found["summary"] = (
            found.get("summary", "") + f" {empty} conversations have nothing to learn."
        )
    return found


def _compare(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, reading: Reading
) -> tuple[list[int], int]:
    """Return the lines whose tokens differ from transformers', from 1, and how many were looked at.

    Only the whole text of a conversation is compared: transformers has no notion of the others.
    """
    different, compared = [], 0
    source = examples.sources[0]
    lines = source.cache.lines
    for number, conversation in conversations_to_compare(source, NUM_COMPARED):
        messages, replies = readable(conversation, reading)
        expected: Any = tokenizer.apply_chat_template(
            messages[: replies[-1] + 1], tools=list(conversation.tools) or None, return_dict=True
        )
        last = int(np.searchsorted(lines, number, side="right")) - 1
        compared += 1
        if source.cache[last].tokens.tolist() != expected["input_ids"]:
            different.append(number + 1)
    return different, compared


def prove_learned(model: PeftModel, lora: LoraSpec) -> Proof:
    """Measure the Frobenius norm of the update (alpha / rank) B A in every target group."""
    chosen = select(target_modules(base_of(model).config.to_dict()), lora.targets)
    layers = lora_layers(model)
    squares = dict.fromkeys(TargetGroup, 0.0)
    still: dict[TargetGroup, int] = {}
    for module in chosen:
        norm = _update_norm(layers[f"model.{module.name}"])
        squares[module.group] += norm**2
        still[module.group] = still.get(module.group, 0) + (not norm > 0)
    norms = {group.value: math.sqrt(squares[group]) for group in still}
    dead = [group.value for group in still if not norms[group.value] > 0]
    summary = "Every target group moved: " if not dead else f"{', '.join(dead)} did not move: "
    summary += ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items()) + "."
    details = {
        "norms": {name: norm if math.isfinite(norm) else None for name, norm in norms.items()},
        "modules_that_did_not_move": {group.value: count for group, count in still.items()},
    }
    passed = not dead and all(math.isfinite(norm) for norm in norms.values())
    return Proof(name="learned", passed=passed, summary=summary, details=details)


def prove_loss(losses: Sequence[float], eval_losses: Sequence[float] = ()) -> Proof:
    """Compare the mean loss of the first and the last tenth of the steps.

    Args:
        losses: Of each step.
        eval_losses: On what was never trained on, the first one before any step; it informs.
    """
    tenth = max(1, len(losses) // 10)
    first, last = fmean(losses[:tenth]), fmean(losses[-tenth:])
    details = {"first_tenth": first, "last_tenth": last, "steps": len(losses)}
    unseen = ""
    if len(eval_losses) > 1:
        details |= {"eval_first": eval_losses[0], "eval_last": eval_losses[-1]}
        unseen = (
            f" On what it was not trained on it went from {eval_losses[0]:.3f} to "
            f"{eval_losses[-1]:.3f}."
        )
    if len(losses) < MIN_STEPS:
        summary = f"{len(losses)} steps are too few to tell whether the loss falls.{unseen}"
        return Proof(name="loss", passed=None, summary=summary, details=details)
    summary = (
        f"The loss went from {first:.3f} to {last:.3f} (means of the first and last tenth).{unseen}"
    )
    return Proof(name="loss", passed=last < first, summary=summary, details=details)


def _trainable(module: nn.Module | LoraLayer) -> int:
    assert isinstance(module, nn.Module)
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


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


def _shown(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # From the mask itself, not from the spans that it was made of.
    segments = []
    tokens, mask = example.tokens.tolist(), example.mask.tolist()
    for is_supervised, run in groupby(range(len(mask)), key=lambda index: mask[index]):
        text = tokenizer.decode([tokens[index] for index in run])
        segments.append({"text": text, "supervised": is_supervised})
    return {"line": example.line + 1, "segments": segments}


@torch.no_grad()
def _update_norm(layer: LoraLayer) -> float:
    # |B A|^2 = trace(B'B A A'): two rank x rank matrices instead of one of the weight's size.
    (name,) = layer.active_adapters
    a_RI, b_OR = _weight(layer.lora_A[name]), _weight(layer.lora_B[name])
    square = ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum()
    return abs(float(layer.scaling[name])) * math.sqrt(max(0.0, float(square)))


def _weight(linear: nn.Module) -> torch.Tensor:
    assert isinstance(linear, nn.Linear)
    return linear.weight.double()
