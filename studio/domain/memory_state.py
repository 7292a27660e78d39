"""Bytes that a run holds from its first to its last step: weights, Adapter, gradients, optimizer.

Counted from a config.json and a JobSpec alone; nothing here was measured on one machine. Sources:
NF4 with double quantisation: QLoRA, arXiv 2305.14314, section 3; states of the 8-bit optimizers:
arXiv 2110.02861, section 2 and bitsandbytes 0.50 optimizer.py; FSDP2: docs.pytorch.org, fully_shard.
Not covered: DoRA's magnitudes (one number a row), what a checkpoint costs while it is written.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from studio.domain.architecture import Architecture
from studio.domain.shapes import Shape, tensor_shapes
from studio.domain.spec import JobSpec
from studio.domain.targets import TargetModule

Method = Literal["qlora", "lora", "full"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "ademamix_8bit"]

FLOAT32, BFLOAT16 = 4, 2
# What stays in 16 bits beside embeddings, head, norms and the convolution: few rows each.
SIXTEEN_BIT = ("in_proj_a", "in_proj_b", "in_proj_ba", "shared_expert_gate", "mlp.gate")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_NF4_BLOCK, _SECOND_BLOCK = 64, 256
# Of each tensor in 4 bits: 16 levels in float32, and the offset of its constants.
_NF4_TABLE_BYTES = 16 * 4 + 4
# 8-bit states: a constant for 256 values; smaller tensors keep float32 (bitsandbytes' default).
_STATE_BLOCK, _MIN_8BIT_SIZE = 256, 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Bytes of the base weights.

    Attributes:
        layers: Of each decoder layer, what FSDP2 shares out.
        outside: Embeddings, last norm and head.
        constants: Of the 4-bit weights; every rank keeps all of them.
        dequantised: Of each decoder layer, the largest weight (of routed experts: one stack of
            all) brought back from 4 bits while it is multiplied; 0 without 4 bits.
    """

    layers: tuple[int, ...]
    outside: int
    constants: int
    dequantised: tuple[int, ...]

    @property
    def total(self) -> int:
        """All of them, whole."""
        return sum(self.layers) + self.outside + self.constants


def is_four_bit(name: str, shape: Shape) -> bool:
    """Tell whether QLoRA keeps a tensor in 4 bits.

    Args:
        name: As `tensor_shapes` names it.
        shape: Its shape.
    """
    if name.endswith(EXPERTS):
        return True
    path, _, leaf = name.rpartition(".")
    is_linear = leaf == "weight" and len(shape) == 2 and ".layers." in f".{path}"
    return is_linear and not path.endswith(SIXTEEN_BIT)


def nf4_bytes(size: int) -> tuple[int, int]:
    """Return bytes of `size` weights in NF4, and of their constants with double quantisation."""
    constants = -(-size // _NF4_BLOCK)
    second = -(-constants // _SECOND_BLOCK)
    return -(-size // 2), constants + FLOAT32 * second + _NF4_TABLE_BYTES


def trains_in_float32(spec: JobSpec) -> bool:
    """Tell whether a full fine-tuning holds its weights in float32, and computes in 16 bits.

    A step is often smaller than the distance of two bfloat16 numbers and is lost then (arXiv
    2010.06192, section 3). Who chooses an 8-bit optimizer saves memory above all: the weights
    stay in 16 bits as well, on the one card that such an optimizer works on.
    """
    return spec.method == "full" and spec.optim.optimizer == "adamw"


def weight_bytes(
    architecture: Architecture, method: Method, *, compute_bytes: int, in_float32: bool = False
) -> Weights:
    """Return what the base weights take.

    Args:
        architecture: What the model is made of.
        method: qlora: linear layers and routed experts in NF4.
        compute_bytes: Of a number in the dtype that is computed in: 2 on GPUs, 4 on a CPU.
        in_float32: Whether weights in full precision are held, whatever is computed in.
    """
    num_layers = len(architecture.layers)
    layers, dequantised = [0] * num_layers, [0] * num_layers
    outside = constants = 0
    each = FLOAT32 if in_float32 else compute_bytes
    for name, shape in tensor_shapes(architecture).items():
        size = math.prod(shape)
        parts = name.split(".")
        number = int(parts[2]) if parts[1] == "layers" else None
        if number is None:
            outside += each * size
        elif method == "qlora" and is_four_bit(name, shape):
            packed, about = nf4_bytes(size)
            layers[number] += packed
            constants += about
            dequantised[number] = max(dequantised[number], compute_bytes * size)
        else:
            layers[number] += each * size
    return Weights(
        layers=tuple(layers),
        outside=outside,
        constants=constants,
        dequantised=tuple(dequantised),
    )


def optimizer_bytes(sizes: Iterable[int], optimizer: Optimizer) -> int:
    """Return what the optimizer remembers of tensors with so many numbers each.

    adamw: two float32 a parameter. The 8-bit forms: a byte for each, and a float32 for 256 of
    them; ademamix three instead of two. Paged states are counted too: they stay on the card as
    long as it has room.
    """
    if optimizer == "adamw":
        return sum(2 * FLOAT32 * size for size in sizes)
    states = 3 if optimizer == "ademamix_8bit" else 2
    total = 0
    for size in sizes:
        if size < _MIN_8BIT_SIZE:
            total += states * FLOAT32 * size
        else:
            total += states * (size + FLOAT32 * -(-size // _STATE_BLOCK))
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What each card holds from the first step on, in bytes.

    Attributes:
        gathered: Of what FSDP2 shares out: all but the layers, which stays for a pass, two layers
            at a time, the one at work and the next, with their Adapter, and a layer's gradient.
        workspace: Of each layer, weights and factors of a LoRA on experts in the compute dtype.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    gathered: int
    workspace: tuple[int, ...]


def resolved(spec: JobSpec) -> Method:
    """Return the method of a spec that has settled it.

    Raises:
        ValueError: It is auto.
    """
    if spec.method == "auto":
        raise ValueError("method auto has no budget of its own; choose_method settles it")
    return spec.method


def held_state(architecture: Architecture, spec: JobSpec, modules: Sequence[TargetModule]) -> State:
    """Return what each card holds from the first step on.

    Args:
        architecture: What the model is made of.
        spec: Method, optimizer and cards.
        modules: What the Adapter trains; nothing with method full.
    """
    method, cards = resolved(spec), max(1, spec.train.num_gpus)
    compute_bytes = BFLOAT16 if spec.train.num_gpus else FLOAT32
    in_float32 = trains_in_float32(spec)
    weights = weight_bytes(architecture, method, compute_bytes=compute_bytes, in_float32=in_float32)
    sizes = [size for module in modules for size in _adapter_tensors(module, spec)]
    adapter = FLOAT32 * sum(sizes)
    trained = adapter
    if method == "full":
        sizes = [math.prod(shape) for shape in tensor_shapes(architecture).values()]
        trained = (FLOAT32 if in_float32 else compute_bytes) * sum(sizes)
    whole = sum(weights.layers) + weights.outside
    return State(
        weights=whole // cards + weights.constants,
        adapter=adapter // cards,
        gradients=trained // cards,
        optimizer=optimizer_bytes(sizes, spec.optim.optimizer) // cards,
        gathered=_gathered(weights, spec, adapter, compute_bytes),
        workspace=_workspace(weights, spec, modules, compute_bytes),
    )


def _adapter_tensors(module: TargetModule, spec: JobSpec) -> Iterable[int]:
    rank = module.num_experts * module.lora_rank(spec.lora)
    yield rank * module.in_features
    yield rank * module.out_features
    if spec.lora.dora:
        yield module.out_features


def _gathered(weights: Weights, spec: JobSpec, adapter: int, compute_bytes: int) -> int:
    largest = sorted(weights.layers)[-2:]
    if trains_in_float32(spec) and spec.train.num_gpus:
        # One card too gathers 16-bit copies; the gradient of a layer is whole in 16 bits and, to be
        # summed, in float32.
        copies = (sum(largest) + weights.outside) * compute_bytes // FLOAT32
        return copies + largest[-1] // FLOAT32 * (compute_bytes + FLOAT32)
    if spec.train.num_gpus <= 1:
        return 0
    return sum(largest) + weights.outside + 3 * adapter // len(weights.layers)


def _workspace(
    weights: Weights, spec: JobSpec, modules: Sequence[TargetModule], compute_bytes: int
) -> tuple[int, ...]:
    """Return the weights of each layer as they are multiplied, and the experts' LoRA beside them.

    The experts bring both factors of both LoRAs to the compute dtype, and scale a gradient of one
    of them in float32.
    """
    workspace = list(weights.dequantised)
    for module in modules:
        if module.kind == "experts" and module.layer is not None:
            workspace[module.layer] += compute_bytes * module.lora_parameters(spec.lora)
            if module.name.endswith("gate_up_proj"):
                workspace[module.layer] += FLOAT32 * module.lora_parameters(spec.lora)
    return tuple(workspace)
