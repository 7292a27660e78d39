"""Weights in 4 bits: NF4 with double quantisation, of linear layers and of 3-D routed experts.

NF4 and double quantisation: QLoRA, arXiv 2305.14314, section 3; the arithmetic is bitsandbytes'.
How they get there while a model loads: see `quantizer`.
Not covered: 8 bits, FP4, experts of other layouts than (experts, out, in).
"""

import math
from collections.abc import Iterable, Sequence

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Params4bit  # type: ignore[attr-defined]
from torch import nn

from studio.errors import EngineError

# Suffixes that stay 16-bit. lm_head: the list replaces transformers' default, which holds it. The
# others are a handful of rows each (gates of the delta net and of the shared expert), so 4 bits
# save nothing and cost precision. The router (mlp.gate) is no nn.Linear in transformers 5; it is
# named in case it becomes one.
SIXTEEN_BIT = ("lm_head", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba", "mlp.gate")
EXPERT_WEIGHTS = ("experts.gate_up_proj", "experts.down_proj")

_BLOCK = 64  # weights that share one constant
_CONSTANT_BLOCK = 256  # constants that share one second constant
_STATES = "nf4_states"


def nf4_states(module: nn.Module) -> dict[str, QuantState]:
    """Return the quantisation states of an experts module by name of weight; empty in 16 bits."""
    states: dict[str, QuantState] = vars(module).get(_STATES, {})
    return states


def expert_weight(module: nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight of all routed experts, dequantised where it is in 4 bits.

    Args:
        module: The experts module.
        name: gate_up_proj or down_proj.
        dtype: Of the result.

    Returns:
        (E, out, in); the parameter itself where it is plain and of that dtype.
    """
    parameter: torch.Tensor = getattr(module, name)
    state = nf4_states(module).get(name)
    if state is None:
        return parameter.to(dtype)
    if state.absmax.device != parameter.device:
        state.to(parameter.device)  # type: ignore[no-untyped-call]
    return dequantize_4bit(parameter.detach(), state).to(dtype)


def quantise_experts(
    parts: Iterable[torch.Tensor], shape: torch.Size, storage: torch.dtype = torch.uint8
) -> Params4bit:
    """Quantise the weights of all experts, one expert at a time.

    Blocks of 64 never reach over the end of an expert, and the second quantisation sees all
    constants together, so the result has the bits that `quantize_4bit` gives for the whole tensor.

    Args:
        parts: (out, in) of each expert, in order.
        shape: (E, out, in).
        storage: Dtype that the packed bytes are kept in: a float under FSDP2, which shards no
            other.

    Returns:
        (E * out * in / 2 / bytes of `storage`, 1), with its quantisation state.

    Raises:
        EngineError: There are more or fewer experts than `shape` says, or of another shape.
    """
    experts, *expert = shape
    size = math.prod(expert)
    if size % _BLOCK:
        raise EngineError(
            f"Experts of shape {tuple(expert)} cannot be brought to 4 bits: {size} weights are no "
            f"multiple of {_BLOCK}.",
            "Choose method lora, which keeps 16 bits.",
        )
    per_expert = size // 2 // storage.itemsize
    packed = constants = torch.empty(0)
    count = 0
    for part in parts:
        if tuple(part.shape) != tuple(expert) or count == experts:
            raise other_shape("The routed experts", (count + 1, *part.shape), shape)
        values, state = quantize_4bit(
            part.contiguous(), blocksize=_BLOCK, quant_type="nf4", quant_storage=storage
        )
        if count == 0:
            refuse_ragged_rows("the routed experts", shape, part.device)
            packed = values.new_empty(experts * per_expert, 1)
            constants = state.absmax.new_empty(experts * size // _BLOCK)
            code, dtype = state.code, part.dtype
        packed[count * per_expert : (count + 1) * per_expert] = values
        constants[count * size // _BLOCK : (count + 1) * size // _BLOCK] = state.absmax
        count += 1
    if count != experts:
        raise other_shape("The routed experts", (count, *expert), shape)
    offset = constants.mean()
    absmax, second = quantize_blockwise(constants - offset, blocksize=_CONSTANT_BLOCK)
    whole = QuantState(  # type: ignore[no-untyped-call]
        absmax=absmax,
        shape=shape,
        dtype=dtype,
        blocksize=_BLOCK,
        code=code,
        quant_type="nf4",
        offset=offset,
        state2=second,
    )
    return packed_parameter(packed, whole)


def refuse_ragged_rows(name: str, shape: Sequence[int], device: torch.device) -> None:
    """Refuse what bitsandbytes 0.50 brings back from 4 bits wrongly, on a CPU and without a word.

    Rows that are no multiple of a block: measured, 96 columns come back with a relative error of
    0.27 where NF4 has 0.09.

    Raises:
        EngineError: Always on a CPU for such rows.
    """
    if device.type == "cpu" and shape[-1] % _BLOCK:
        raise EngineError(
            f"Rows of {shape[-1]} weights, as in {name}, cannot be held in 4 bits on a CPU: "
            f"bitsandbytes restores them wrongly there unless they are a multiple of {_BLOCK}.",
            "Choose method lora, or train on a GPU.",
            "method",
        )


def four_bit_tensors(model: nn.Module) -> Iterable[tuple[str, Params4bit]]:
    """List the weights that are in 4 bits, with their full names."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Params4bit):
            yield name, parameter


def packed_parameter(packed: torch.Tensor, state: QuantState) -> Params4bit:
    """Return packed bytes as the parameter that stands for them.

    A Params4bit: moving the module moves the state that it shares with `nf4_states`, and libraries
    that count parameters count the weights, not the bytes.
    """
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=_BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=packed.dtype,
        bnb_quantized=True,
    )


def keep_state(model: nn.Module, name: str, parameter: Params4bit) -> None:
    """Keep the state on the module too: FSDP2 replaces the parameter, and the state with it."""
    path, _, leaf = name.rpartition(".")
    vars(model.get_submodule(path)).setdefault(_STATES, {})[leaf] = parameter.quant_state


def other_shape(what: str, found: Iterable[int], expected: Iterable[int]) -> EngineError:
    """Return what to say of weights and config.json that disagree about a shape."""
    return EngineError(
        f"{what} have the shape {tuple(found)} in the weights, but {tuple(expected)} by the "
        "config.json.",
        "Use the config.json that was published with the weights.",
    )
