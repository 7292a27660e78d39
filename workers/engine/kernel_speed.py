"""How many times faster each kernel is than the plain form that would replace it, on this device.

Forward and backward pass of one layer of Qwen3.5-35B-A3B's shape on 4,096 tokens, random inputs:
the plain form is what transformers runs where the package is missing.
"""

import inspect
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.qwen3_next import modeling_qwen3_next

TOKENS = 4096
_WARM_UPS, _ROUNDS = 3, 5

Form = Callable[..., torch.Tensor]


def times_faster(fast: Form, plain: Form, inputs: tuple[torch.Tensor, ...]) -> float:
    """Return the time of the plain form by that of the fast one, forward and backward, in turns.

    Args:
        fast: Takes the inputs.
        plain: Takes the same.
        inputs: Those that want a gradient get one.
    """
    taken: dict[Form, list[float]] = {fast: [], plain: []}
    for round_ in range(_WARM_UPS + _ROUNDS):
        for form, seconds in taken.items():
            took = _time(form, inputs)
            if round_ >= _WARM_UPS:
                seconds.append(took)
    return median(taken[plain]) / median(taken[fast])


def _time(form: Form, inputs: tuple[torch.Tensor, ...]) -> float:
    wanted = [x for x in inputs if x.requires_grad]
    _wait(inputs[0].device)
    start = time.perf_counter()
    result = form(*inputs)
    # Its own values as gradient: as random as they are, and no stride of zero.
    torch.autograd.grad(result, wanted, result.detach().contiguous())
    _wait(inputs[0].device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def delta_rule_speed(rule: Callable[..., Any], device: torch.device, tokens: int = TOKENS) -> float:
    """Compare a gated delta rule with transformers' plain one, 16 and 32 heads of 128."""
    chunked: Callable[..., Any] = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    q, k = (_draw(device, 1, tokens, 16, 128) for _ in range(2))
    v = _draw(device, 1, tokens, 32, 128)
    beta = _draw(device, 1, tokens, 32).detach().sigmoid().requires_grad_()
    g = F.logsigmoid(_draw(device, 1, tokens, 32).detach().float()).requires_grad_()

    def run(form: Callable[..., Any]) -> Form:
        return lambda q, k, v, g, beta: form(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[
            0
        ]

    return times_faster(run(rule), run(chunked), (q, k, v, g, beta))


def convolution_speed(
    convolve: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    device: torch.device,
    tokens: int = TOKENS,
) -> float:
    """Compare a causal convolution with torch's, 8,192 channels of width 4."""
    x, weight = _draw(device, 1, tokens, 8192), _draw(device, 8192, 4)
    bounds = torch.tensor([0, tokens], device=device, dtype=torch.int32)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = F.pad(x.transpose(1, 2), (3, 0))
        return F.silu(F.conv1d(rows, weight[:, None], groups=8192)).transpose(1, 2)

    return times_faster(lambda x, w: convolve(x, w, bounds), plain, (x, weight))


def attention_speed(
    attend: Callable[..., torch.Tensor], device: torch.device, tokens: int = TOKENS
) -> float:
    """Compare attention over packed documents of 512 tokens with one call for each document."""
    q = _draw(device, tokens, 16, 256)
    k, v = (_draw(device, tokens, 2, 256) for _ in range(2))
    length = min(512, tokens)
    bounds = torch.arange(0, tokens + 1, length, device=device, dtype=torch.int32)
    ends = bounds.tolist()

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = []
        for start, end in pairwise(ends):
            rows = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            found = F.scaled_dot_product_attention(
                rows[0], rows[1], rows[2], is_causal=True, enable_gqa=True
            )
            parts.append(found[0].transpose(0, 1))
        return torch.cat(parts)

    return times_faster(lambda q, k, v: attend(q, k, v, bounds, length), plain, (q, k, v))


def grouped_matmul_speed(
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    device: torch.device,
    tokens: int = TOKENS,
) -> float:
    """Compare a product in 64 groups with a loop over them."""
    x, weight = _draw(device, tokens, 2048), _draw(device, 64, 512, 2048)
    ends = torch.arange(1, 65, device=device, dtype=torch.int32) * (tokens // 64)
    sizes = [tokens // 64] * 64

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = torch.split(x, sizes)
        return torch.cat([r @ w.T for r, w in zip(rows, weight, strict=True)])

    return times_faster(lambda x, w: multiply(x, w, ends), plain, (x, weight))


def _draw(device: torch.device, *shape: int) -> torch.Tensor:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()
