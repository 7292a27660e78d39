"""Attention within each document of a packed row, and the masks that go with it.

Two functions under names of ours in transformers' own tables; `set_attn_implementation` chooses
one. Both read the boundaries of documents from `cu_seq_lens_q` (workers.engine.batches); a row
without them goes to `sdpa`. Not covered: rows packed by `position_ids` alone, sliding windows.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# T tokens, H heads, K head size
PER_DOCUMENT, VARLEN = "studio_per_document", "studio_varlen"
# torch's varlen attention is FlashAttention 2.
_VARLEN_DTYPES, _VARLEN_HEAD_DIM = (torch.float16, torch.bfloat16), 256

_SAME_SCALE = 1e-6


def fits_varlen(model: PreTrainedModel) -> bool:
    """Return whether torch's varlen attention takes the dtype and the head size of a model."""
    return model.dtype in _VARLEN_DTYPES and model.config.head_dim <= _VARLEN_HEAD_DIM


def bounds_of(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    """Return where each document begins and ends; on a GPU this waits for it.

    Args:
        cu_seqlens: (N + 1,), where each begins, and where the last one ends.
    """
    return list(pairwise(cu_seqlens.tolist()))


def _sdpa(*inputs: Any, **options: Any) -> tuple[torch.Tensor, None]:
    found: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](*inputs, **options)
    return found


def _per_document_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each document of a packed row by itself; (1, H, T, K) in, (1, T, H, K) out."""
    if cu_seq_lens_q is None:
        return _sdpa(module, query, key, value, attention_mask, **options)
    results = []
    for start, end in bounds_of(cu_seq_lens_q):
        part = slice(start, end)
        inside = (each[:, :, part] for each in (query, key, value))
        results.append(_sdpa(module, *inside, None, **options)[0])
    return torch.cat(results, dim=1), None


def _varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each document of a packed row in one call; (1, H, T, K) in, (1, T, H, K) out.

    It has no dropout; none of these models has any in its attention.
    """
    if cu_seq_lens_q is None:
        return _sdpa(module, query, key, value, attention_mask, **options)
    attend, settings, has_groups = _varlen_function()
    q_THK, k_THK, v_THK = (each[0].transpose(0, 1) for each in (query, key, value))
    if not has_groups:
        times = q_THK.shape[1] // k_THK.shape[1]
        k_THK, v_THK = (each.repeat_interleave(times, dim=1) for each in (k_THK, v_THK))
    # The function scales by K ** -0.5 itself, in every version, and so do all these models.
    further = options["scaling"] * q_THK.shape[-1] ** 0.5
    if abs(further - 1) > _SAME_SCALE:
        q_THK = q_THK * further
    ends, longest = cu_seq_lens_q, max_length_q
    found_THK = attend(q_THK, k_THK, v_THK, ends, ends, longest, longest, **settings)
    return found_THK[None], None


@cache
def _varlen_function() -> tuple[Callable[..., Any], dict[str, Any], bool]:
    """Return torch's varlen attention, what makes it causal, and whether it groups heads itself.

    Causal is a flag up to torch 2.11 and a window since; groups came with the window.
    """
    module: Any = importlib.import_module("torch.nn.attention.varlen")
    known = inspect.signature(module.varlen_attn).parameters
    settings: dict[str, Any] = (
        {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    )
    has_groups = "enable_gqa" in known
    return module.varlen_attn, settings | ({"enable_gqa": True} if has_groups else {}), has_groups


def _mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """Return the mask that `sdpa` would get, and none for rows that are causal or packed.

    transformers would make one of T x T for a packed row; our attention reads its boundaries.
    """
    if attention_mask is None and local_size is None and q_length == kv_length:
        return None
    found: torch.Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        **options,
    )
    return found


for _name, _function in ((PER_DOCUMENT, _per_document_attention), (VARLEN, _varlen_attention)):
    ALL_ATTENTION_FUNCTIONS.register(_name, _function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, _mask)
