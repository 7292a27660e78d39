"""Proofs of the Adapter: it stands on the selected layers alone, and every group moved."""

import math

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from studio.domain.lora_spec import LoraSpec
from studio.domain.proof import Proof
from studio.domain.targets import TargetGroup, count_by_group, select, target_modules
from workers.engine.lora import base_of, lora_layers


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


def _trainable(module: nn.Module | LoraLayer) -> int:
    assert isinstance(module, nn.Module)
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


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
