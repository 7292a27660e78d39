"""Proofs of the Adapter: it stands on the selected layers alone, and every group learned.

The update of a layer is W' - W, which is (alpha / rank) B A but for DoRA. Its energy is its
Frobenius norm over that of the weight, dequantised where that is in 4 bits.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding
from torch import nn

from studio.domain.lora_spec import LoraSpec
from studio.domain.proof import Proof
from studio.domain.targets import TargetGroup, TargetModule, count_by_group, selected
from workers.engine.lora import base_of, lora_layers
from workers.engine.parallel import whole_tensor
from workers.engine.quantize import nf4_states

# An update larger than the weights that it is added to leaves little of them: runs that diverged
# had 130 to 2,000; tiny random bases that learn facts by heart have 0.2 to 0.6, others 0.002 to 0.1.
MAX_SHARE = 1.0


def prove_targets(model: PeftModel, lora: LoraSpec) -> Proof:
    """Compare what carries a LoRA, and all that trains, with what was selected."""
    chosen = selected(base_of(model).config.to_dict(), lora)
    module_of = {module.full_name: module for module in chosen}
    expected = count_by_group(chosen, lora)
    layers = lora_layers(model)
    modules = dict.fromkeys(expected, 0)
    parameters = dict.fromkeys(expected, 0)
    wrong_size = []
    for name, layer in layers.items():
        if (module := module_of.get(name)) is not None:
            size = _trainable(layer)
            modules[module.group] += 1
            parameters[module.group] += size
            if size != module.lora_parameters(lora):
                wrong_size.append(name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lost, extra = sorted(module_of.keys() - layers.keys()), sorted(layers.keys() - module_of.keys())
    total = sum(expected.values())
    passed = not lost and not extra and not wrong_size and trainable == total
    summary = (
        f"{len(layers)} layers carry a LoRA of {trainable:,} trainable parameters, exactly the "
        f"selected ones."
        if passed
        else f"{len(module_of)} layers with {total:,} parameters were selected, "
        f"but {len(layers)} layers carry a LoRA and {trainable:,} parameters train."
    )
    details = {
        "groups": {
            group.value: {"modules": modules[group], "parameters": parameters[group]}
            for group in expected
        },
        "trainable_parameters": trainable,
        "expected_parameters": total,
        "missing": lost,
        "unexpected": extra,
        "wrong_size": wrong_size,
    }
    return Proof(name="targets", passed=passed, summary=summary, details=details)


def prove_learned(model: PeftModel, lora: LoraSpec) -> Proof:
    """Measure the energy of the update in every target group, layer by layer.

    A group whose update is zero did not learn, and is named. A routed expert whose update is zero
    is only counted: no gradient comes to an expert that no token is routed to.
    All ranks call it where weights are shared out.
    """
    chosen = selected(base_of(model).config.to_dict(), lora)
    layers = lora_layers(model)
    groups: dict[str, _Energy] = {}
    by_layer: dict[str, dict[str, _Energy]] = {}
    still: dict[str, int] = {}
    moved: dict[int | None, torch.Tensor] = {}
    for module in chosen:
        name = module.group.value
        squares_E, weight = _squares(layers[module.full_name], module)
        energy = _Energy(update=float(squares_E.sum()), weight=weight)
        groups[name] = groups.get(name, _Energy()) + energy
        place = by_layer.setdefault("model" if module.layer is None else str(module.layer), {})
        place[name] = place.get(name, _Energy()) + energy
        still[name] = still.get(name, 0) + (not energy.update > 0)
        if module.kind == "experts":
            moved[module.layer] = (squares_E > 0) | moved.get(module.layer, squares_E > 0)
    groups = {group.value: groups[group.value] for group in TargetGroup if group.value in groups}
    dead = [name for name, energy in groups.items() if not energy.update > 0]
    summary = "Every target group learned: " if not dead else f"{', '.join(dead)} did not learn: "
    summary += ", ".join(f"{name} {_text(energy.share)}" for name, energy in groups.items())
    summary += " (norm of the update over norm of the weight)."
    details: dict[str, Any] = {
        "norms": {name: energy.norm for name, energy in groups.items()},
        "energy": {name: energy.share for name, energy in groups.items()},
        "layers": {
            layer: {name: energy.share for name, energy in place.items()}
            for layer, place in by_layer.items()
        },
        "modules_that_did_not_learn": still,
    }
    if moved:
        idle = {str(layer): int((~is_E).sum()) for layer, is_E in moved.items()}
        num_experts = sum(len(is_E) for is_E in moved.values())
        details["experts_that_did_not_learn"] = idle
        if sum(idle.values()):
            summary += (
                f" {sum(idle.values()):,} of {num_experts:,} routed experts have no update: no "
                "token that counts came to them."
            )
    drowned = [name for name, energy in groups.items() if (energy.share or 0.0) > MAX_SHARE]
    if drowned:
        summary += f" In {', '.join(drowned)} it is larger than the base itself: that is lost."
    passed = not dead and not drowned
    passed = passed and all(energy.norm is not None for energy in groups.values())
    return Proof(name="learned", passed=passed, summary=summary, details=details)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Energy:
    """Sums of squares of an update and of the weights that it changes."""

    update: float = 0.0
    weight: float = 0.0

    def __add__(self, other: "_Energy") -> "_Energy":
        return _Energy(update=self.update + other.update, weight=self.weight + other.weight)

    @property
    def norm(self) -> float | None:
        """Norm of the update; None where it is not finite."""
        return math.sqrt(self.update) if math.isfinite(self.update) else None

    @property
    def share(self) -> float | None:
        """Norm of the update over norm of the weight; None where it is not finite."""
        if self.norm is None or not math.isfinite(self.weight) or not self.weight > 0:
            return None
        return float(f"{self.norm / math.sqrt(self.weight):.6g}")


def _text(share: float | None) -> str:
    return "not finite" if share is None else f"{share:.2%}" if share >= 1e-4 else f"{share:.1e}"


def _trainable(layer: LoraLayer) -> int:
    # Not all parameters below it: another LoRA may stand inside, as in two projections of experts.
    assert isinstance(layer, nn.Module)
    return sum(
        parameter.numel()
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not name.startswith("base_layer.")
    )


@torch.no_grad()
def _squares(layer: LoraLayer, module: TargetModule) -> tuple[torch.Tensor, float]:
    """Return the sum of squares of the update, of each expert alone, and that of the weight."""
    (name,) = layer.active_adapters
    a_ERI, b_EOR = _factors(layer, module, name)
    scaling = float(layer.scaling[name])
    weight = _dense(layer, module)
    if layer.use_dora.get(name, False):
        return _dora_square(layer, name, weight, scaling * (b_EOR @ a_ERI)[0])
    # |B A|^2 = trace(B'B A A'): two rank x rank matrices instead of one of the weight's size.
    squares_E = ((b_EOR.mT @ b_EOR) * (a_ERI @ a_ERI.mT)).sum((1, 2)).clamp(min=0)
    return scaling**2 * squares_E, _square(weight)


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) ** 2


def _dora_square(
    layer: LoraLayer, name: str, weight_OI: torch.Tensor, change_OI: torch.Tensor
) -> tuple[torch.Tensor, float]:
    # DoRA, arXiv 2402.09353, equation 5: W' = m (W + B A) / |W + B A|, row by row.
    magnitude: Any = layer.lora_magnitude_vector[name]
    lengths_O = whole_tensor(magnitude.weight).double()
    turned_OI = weight_OI.double() + change_OI
    turned_OI *= (lengths_O / turned_OI.norm(dim=1))[:, None]
    return (turned_OI - weight_OI.double()).square().sum()[None], _square(weight_OI)


def _factors(
    layer: LoraLayer, module: TargetModule, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (E, R, in) and B (E, out, R) in float64."""
    parts: Any = layer
    if isinstance(layer, Embedding):
        a, b = parts.lora_embedding_A[name], parts.lora_embedding_B[name]
    else:
        a, b = parts.lora_A[name].weight, parts.lora_B[name].weight
    a, b = whole_tensor(a).double(), whole_tensor(b).double()
    # PEFT's layout: experts are slowest in A and fastest in B (ParamWrapper.get_delta_weight).
    a_ERI = a.view(module.num_experts, -1, a.shape[1])
    return a_ERI, b.view(b.shape[0], -1, module.num_experts).permute(2, 0, 1)


def _dense(layer: LoraLayer, module: TargetModule) -> torch.Tensor:
    """Return the weight of the base, whole and dequantised."""
    base: Any = layer.get_base_layer()
    if module.kind == "experts":
        leaf = module.name.rpartition(".")[2]
        state, weight = nf4_states(base).get(leaf), getattr(base, leaf)
    else:
        # bitsandbytes keeps it on the module, too, where FSDP2 leaves it alone.
        weight = base.weight
        state = vars(weight).get("quant_state") or vars(base).get("quant_state")
    weight = whole_tensor(weight).detach()
    return weight if state is None else dequantize_4bit(weight, state)
