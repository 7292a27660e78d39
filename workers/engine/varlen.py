"""Keep the documents of a packed row apart: in attention, in the convolution, in the delta rule.

What transformers 5.23 does with a packed row: full attention reads the boundaries from
`position_ids` and makes a mask of T x T; the Gated DeltaNet never sees `position_ids`, so its
convolution and its state run on from one document into the next without a word. Given
`cu_seq_lens_q` it refuses without flash-linear-attention; with it, but without causal_conv1d, the
convolution alone leaks. So `enable_packing` gives a model its own way through all three.

Attention has an official door: functions registered under names of ours, for attention and mask.
The delta net has none that works without the `kernels` package and a repository on the hub: its
layer calls two functions of its module by name. They are not replaced there, where every other
model would meet them. Each layer gets its own class's forward, same code, with a copy of the
module's names in which these two are ours; `disable_packing` takes it away again. A row without
boundaries (padded, evaluated, generated) goes on to transformers' functions as before.

On a GPU flash-linear-attention and torch's varlen attention do the work. Elsewhere: each document
attends by itself; the row is convolved whole, and then the first tokens of each document, which
saw the one before, are convolved again behind zeros (1.1 to 1.2 times the time of the row alone;
one call per document takes up to three times as long); and documents with the same number of
chunks go through the delta rule as rows of one batch, padded on the right with zeros, which change
nothing before them.

Not covered: sliding windows, and rows packed by `position_ids` alone.
"""

import importlib
import importlib.util
import inspect
from collections import defaultdict
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from studio.errors import EngineError
from workers.engine.attention import PER_DOCUMENT, VARLEN, bounds_of, fits_varlen
from workers.engine.lora import base_of

# T tokens, N documents, C channels, H heads, K head size, L tokens of the convolution's kernel
_CONVOLUTION, _DELTA_RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
# The default of transformers' torch_chunk_gated_delta_rule, which pads to whole chunks.
_CHUNK_TOKENS = 64

Function = Callable[..., Any]


def enable_packing(model: PeftModel | PreTrainedModel, *, use_kernels: bool = True) -> str:
    """Make a model keep the documents of packed rows apart; other rows are computed as before.

    Call it before the layers are wrapped for several processes.

    Args:
        model: A text model, on the device where it will compute.
        use_kernels: Whether fast kernels may be used where they are; without them the plain forms
            run, which are correct everywhere.

    Returns:
        What runs each part, as in `attention: torch varlen; convolution: fla; delta rule: fla`.

    Raises:
        EngineError: The model has sliding windows, or layers that this cannot be done for.
    """
    base = base_of(model) if isinstance(model, PeftModel) else model
    if getattr(base.config, "sliding_window", None) is not None:
        raise EngineError(
            f"Packing cannot be used with a sliding window ({base.config.sliding_window} tokens).",
            "Turn packing off.",
            "batch.packing",
        )
    disable_packing(model)
    is_fast = use_kernels and base.device.type == "cuda"
    attention = VARLEN if is_fast and fits_varlen(base) else PER_DOCUMENT
    before = base.config._attn_implementation  # noqa: SLF001  # transformers has no public reader
    vars(base)["_attention_before_packing"] = before
    base.set_attn_implementation(attention)
    said = [f"attention: {'torch varlen' if attention == VARLEN else 'per document'}"]
    layers = delta_nets(base)
    has_fla = is_fast and importlib.util.find_spec("fla") is not None
    forwards = {kind: _packing_forward(kind, has_fla) for kind in {type(each) for each in layers}}
    for layer in layers:
        vars(layer)["forward"] = MethodType(forwards[type(layer)], layer)
    if layers:
        said += [
            f"{part}: {'fla' if has_fla else 'plain'}" for part in ("convolution", "delta rule")
        ]
    return "; ".join(said)


def disable_packing(model: PeftModel | PreTrainedModel) -> None:
    """Take back what `enable_packing` did; nothing where it did nothing."""
    base = base_of(model) if isinstance(model, PeftModel) else model
    before = vars(base).pop("_attention_before_packing", None)
    if before is not None:
        base.set_attn_implementation(before)
    for layer in delta_nets(base):
        vars(layer).pop("forward", None)


def delta_nets(base: nn.Module) -> list[nn.Module]:
    """Return the Gated DeltaNet layers of a model."""
    return [module for module in base.modules() if type(module).__name__.endswith("GatedDeltaNet")]


def _packing_forward(layer: type[nn.Module], has_fla: bool) -> FunctionType:
    """Return the forward of a delta net whose convolution and delta rule know of documents.

    Raises:
        EngineError: This version of transformers wrote the layer otherwise.
    """
    forward = inspect.unwrap(layer.forward)
    assert isinstance(forward, FunctionType)
    names, lost = forward.__globals__, {_CONVOLUTION, _DELTA_RULE} - set(forward.__code__.co_names)
    if lost:
        raise EngineError(
            f"{layer.__name__} of this version of transformers does not call {sorted(lost)[0]}, so "
            "the documents of a packed row cannot be kept apart in it.",
            "Turn packing off, or install the version of transformers that the studio was made "
            "with.",
            "batch.packing",
        )
    convolution, rule = names[_CONVOLUTION], names[_DELTA_RULE]
    own = {
        _CONVOLUTION: _fla_convolution(convolution) if has_fla else _convolution(convolution),
        _DELTA_RULE: rule if has_fla else _delta_rule(rule),
    }
    bound = FunctionType(
        forward.__code__,
        {**names, **own},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    bound.__kwdefaults__ = forward.__kwdefaults__
    return bound


def _convolution(plain: Function) -> Function:
    """Return transformers' causal convolution with documents kept apart."""
    reference = inspect.unwrap(plain)

    def convolve(
        row_1CT: torch.Tensor,
        weight_CL: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        found_1CT: torch.Tensor
        if cu_seq_lens_q is None:
            found_1CT = plain(row_1CT, weight_CL, bias, activation=activation, **more)
            return found_1CT
        found_1CT = reference(row_1CT, weight_CL, bias, activation=activation)
        # The first document has zeros before it already.
        later = bounds_of(cu_seq_lens_q)[1:]
        # Token t sees tokens t - L + 1 to t.
        reach = weight_CL.shape[-1] - 1
        if not later or not reach:
            return found_1CT
        starts = [row_1CT[0, :, start : min(end, start + reach)] for start, end in later]
        starts_NCL = pad_sequence([start.T for start in starts], batch_first=True).mT
        again_NCL = reference(starts_NCL, weight_CL, bias, activation=activation)
        widths = [start.shape[-1] for start in starts]
        again = [each[:, :width] for each, width in zip(again_NCL, widths, strict=True)]
        places = torch.cat(
            [torch.arange(s, s + w) for (s, _), w in zip(later, widths, strict=True)]
        )
        return found_1CT.index_copy(2, places.to(found_1CT.device), torch.cat(again, 1)[None])

    return convolve


def _delta_rule(plain: Function) -> Function:
    """Return transformers' chunked gated delta rule with documents kept apart."""
    reference = inspect.unwrap(plain)

    def compute(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        g: torch.Tensor,
        beta: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = (query, key, value, g, beta)
        if cu_seqlens is None:
            found: tuple[torch.Tensor, torch.Tensor | None] = plain(
                *inputs[:3], g=g, beta=beta, **more
            )
            return found
        # A cache would get the state of the last document for all of them.
        assert not more.get("output_final_state"), "a packed row has no cache"
        bounds = bounds_of(cu_seqlens)
        same_chunks = defaultdict[int, list[int]](list)
        for number, (start, end) in enumerate(bounds):
            same_chunks[-(-(end - start) // _CHUNK_TOKENS)].append(number)
        results = list[torch.Tensor]([value] * len(bounds))
        for numbers in same_chunks.values():
            q, k, v, decay, strength = (
                pad_sequence([each[0, slice(*bounds[n])] for n in numbers], batch_first=True)
                for each in inputs
            )
            rows = reference(q, k, v, g=decay, beta=strength, use_qk_l2norm_in_kernel=True)[0]
            for row, number in zip(rows, numbers, strict=True):
                results[number] = row[: bounds[number][1] - bounds[number][0]]
        return torch.cat(results)[None], None

    return compute


def _fla_convolution(plain: Function) -> Function:
    """Return flash-linear-attention's convolution, called as transformers' is.

    transformers looks for causal_conv1d only, which has to be compiled.
    """
    # Imported here: it needs Triton and takes seconds.
    module: Any = importlib.import_module("fla.modules.causal_conv1d")

    def convolve(
        row_1CT: torch.Tensor,
        weight_CL: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        found_1CT: torch.Tensor
        if cu_seq_lens_q is None:
            found_1CT = plain(row_1CT, weight_CL, bias, activation=activation, **more)
            return found_1CT
        found_1CT = module.causal_conv1d(
            x=row_1CT.transpose(1, 2),
            weight=weight_CL,
            bias=bias,
            activation=activation,
            cu_seqlens=cu_seq_lens_q,
        )[0].transpose(1, 2)
        return found_1CT

    return convolve
