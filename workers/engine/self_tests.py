"""Numeric self-tests of kernels: results and gradients against plain, independent arithmetic.

Each test takes the implementation, so that a wrong one can be given to it on purpose. Inputs are
seeded and random; two documents of odd lengths share a row, so that a leak between them shows.
The errors are relative Frobenius norms, the largest over all results and gradients.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

# T tokens, H heads, K head size of keys, V of values, C channels, E experts, I inner size
LENGTHS = (70, 123)
# Kernels of 16 bits round; plain float32 arithmetic differs by its order of summation alone.
LIMIT_16BIT, LIMIT_32BIT = 2e-2, 1e-4


def limit(dtype: torch.dtype) -> float:
    """Return the largest error that rounding alone explains."""
    return LIMIT_32BIT if dtype == torch.float32 else LIMIT_16BIT


def bounds(device: torch.device) -> torch.Tensor:
    """Return where the documents begin and end (3), int32."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return ends.to(device, torch.int32)


def delta_rule_error(
    rule: Callable[..., tuple[torch.Tensor, object]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (2, 4),
    head_dim: int = 128,
) -> float:
    """Try a gated delta rule with the signature of fla's chunk_gated_delta_rule.

    Args:
        rule: Takes q, k (1, T, H, K), v (1, T, HV, V), g, beta (1, T, HV), use_qk_l2norm_in_kernel
            and cu_seqlens; returns the output (1, T, HV, V) first.
        device: Where to try it.
        dtype: Of q, k, v, beta; g is float32.
        heads: Of keys and of values.
        head_dim: Of both.
    """
    draw = _Draw(device, dtype)
    num_tokens, (keys, values) = sum(LENGTHS), heads
    q, k = (draw(1, num_tokens, keys, head_dim) for _ in range(2))
    v = draw(1, num_tokens, values, head_dim)
    beta = draw(1, num_tokens, values).detach().sigmoid().requires_grad_()
    # A state that lives for some fifty tokens: one that is forgotten at once would hide a leak.
    decay = draw(1, num_tokens, values, dtype=torch.float32).detach() + 4
    g = F.logsigmoid(decay).requires_grad_()
    inputs = (q, k, v, g, beta)

    def tried() -> torch.Tensor:
        return rule(
            q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=bounds(device)
        )[0]

    return _compare(tried, lambda: _by_document(_delta_rule, inputs), inputs)


def _delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Compute the gated delta rule token by token (Gated Delta Networks, arXiv 2412.06464, eq. 10).

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}' k_t)', o_t = S_t' q_t / sqrt(K).
    """
    groups = v.shape[2] // k.shape[2]
    q, k = (F.normalize(x, dim=-1, eps=1e-6).repeat_interleave(groups, 2) for x in (q, k))
    state_BHKV = v.new_zeros(1, v.shape[2], k.shape[3], v.shape[3])
    outputs = []
    for t in range(v.shape[1]):
        state_BHKV = state_BHKV * g[:, t, :, None, None].exp()
        known = (state_BHKV * k[:, t, :, :, None]).sum(2)
        change = beta[:, t, :, None] * (v[:, t] - known)
        state_BHKV = state_BHKV + k[:, t, :, :, None] * change[:, :, None, :]
        outputs.append((state_BHKV * q[:, t, :, :, None]).sum(2))
    output: torch.Tensor = torch.stack(outputs, 1) * k.shape[3] ** -0.5
    return output


def convolution_error(
    convolve: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    channels: int = 256,
    width: int = 4,
) -> float:
    """Try a causal depthwise convolution with SiLU.

    Args:
        convolve: Takes x (1, T, C), weight (C, width) and the bounds of documents (int32).
        device: Where to try it.
        dtype: Of x and weight.
        channels: C.
        width: Taps of the convolution.
    """
    draw = _Draw(device, dtype)
    x, weight = draw(1, sum(LENGTHS), channels), draw(channels, width)

    def plain(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x.transpose(1, 2), (width - 1, 0))
        return F.silu(F.conv1d(padded, weight.float()[:, None], groups=channels)).transpose(1, 2)

    return _compare(
        lambda: convolve(x, weight, bounds(device)),
        lambda: _by_document(plain, (x,)),
        (x, weight),
    )


def attention_error(
    attend: Callable[..., torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 256,
) -> float:
    """Try a causal attention over packed documents.

    Args:
        attend: Takes q (T, H, D), k, v (T, HK, D), the bounds of documents (int32) and the longest.
        device: Where to try it.
        dtype: Of q, k, v.
        heads: Of queries and of keys.
        head_dim: D.
    """
    draw = _Draw(device, dtype)
    q = draw(sum(LENGTHS), heads[0], head_dim)
    k, v = (draw(sum(LENGTHS), heads[1], head_dim) for _ in range(2))
    groups = heads[0] // heads[1]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * head_dim**-0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    inputs = (q, k, v)
    return _compare(
        lambda: attend(q, k, v, bounds(device), max(LENGTHS))[None],
        lambda: _by_document(plain, [x[None] for x in inputs]),
        inputs,
    )


def grouped_matmul_error(
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Try a matrix product in groups of rows.

    Args:
        multiply: Takes x (S, I), weight (E, O, I) and the end of each group (E), int32.
        device: Where to try it.
        dtype: Of x and weight.
    """
    draw = _Draw(device, dtype)
    sizes = [17, 0, 64, 5]
    x, weight = draw(sum(sizes), 128), draw(len(sizes), 96, 128)
    ends = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)

    def plain() -> torch.Tensor:
        rows = torch.split(x.float(), sizes)
        return torch.cat([r @ w.float().T for r, w in zip(rows, weight, strict=True)])

    return _compare(lambda: multiply(x, weight, ends), plain, (x, weight))


# The sixteen numbers of NF4: QLoRA, arXiv 2305.14314, appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NF4_BLOCK = 64


def nf4_error(
    round_trip: Callable[[torch.Tensor], torch.Tensor], device: torch.device, dtype: torch.dtype
) -> float:
    """Try quantising to NF4 and back, in blocks of 64 with a float32 scale each.

    Args:
        round_trip: Takes and returns a weight (O, I).
        device: Where to try it.
        dtype: Of the weight.
    """
    weight = _Draw(device, dtype)(96, 256).detach()
    blocks = weight.float().reshape(-1, _NF4_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(_NF4, device=device)
    nearest = (blocks[..., None] / scale[..., None] - codes).abs().argmin(-1)
    expected = (codes[nearest] * scale).reshape(weight.shape)
    return float((round_trip(weight).float() - expected).norm() / expected.norm())


class _Draw:
    """Seeded random inputs that want a gradient."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._device, self._dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self._generator)
        return drawn.to(self._device, dtype or self._dtype).requires_grad_()


def _by_document(
    plain: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Apply plain arithmetic in float32 to each document alone; documents lie along axis 1."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    parts = [plain(*(x[:, start:end].float() for x in inputs)) for start, end in pairwise(ends)]
    return torch.cat(parts, 1)


def _compare(
    tried: Callable[[], torch.Tensor],
    plain: Callable[[], torch.Tensor],
    inputs: Sequence[torch.Tensor],
) -> float:
    """Return the largest relative error of the result and of the gradient of each input."""
    expected = plain()
    drawn = torch.randn(expected.shape, generator=torch.Generator("cpu").manual_seed(1))
    weights = drawn.to(expected.device)
    found = tried()
    gradients = [
        torch.autograd.grad((result.float() * weights).sum(), inputs)
        for result in (expected, found)
    ]
    pairs = [(found.detach(), expected.detach()), *zip(gradients[1], gradients[0], strict=True)]
    return max(float((f.float() - e.float()).norm() / e.float().norm()) for f, e in pairs)
