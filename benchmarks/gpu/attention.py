"""Attention over packed documents: heads of 256 with groups, as the presets have them.

    python -m benchmarks.gpu.attention [--out FOLDER] [--device cpu --tiny]

The engine's own attention function (torch's varlen attention on a GPU, document by document on a
CPU), forward and backward. First packed rows are compared with plain float32 attention of each
document alone, output and gradients; then rows of one document and of many are timed. FLOP are
those of the causal half: 2 x L^2 x heads x size for a document of L tokens forward, 2.5 times that
backward.
"""

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.gpu.chat import chat_lengths
from benchmarks.gpu.clock import matmul_rate, per_second, poison, timed
from benchmarks.gpu.presets import PRESETS, architecture_of
from benchmarks.gpu.record import Record, arguments, checked
from workers.engine.attention import PER_DOCUMENT, VARLEN
from workers.engine.self_tests import limit

COMPARED = (17, 700, 1331, 2000)
TOKENS = (4096, 16384, 32768)
_NAMES = ("output", "q", "k", "v")
# T tokens, H heads of queries, K heads of keys, D head size


def main(argv: Sequence[str] | None = None) -> int:
    """Try and time everything; return 1 when a result is wrong."""
    record = Record("attention", checked(arguments(__doc__), argv))
    rate = matmul_rate(record.device)
    record.row("one product, 8192 x 8192 x 8192", tflops=None if rate is None else rate / 1e12)
    for name in PRESETS:
        documents = (5, 40, 19) if record.is_tiny else COMPARED
        record.attempt("equality", partial(compare, record, name, documents), model=name)
        for tokens in (96,) if record.is_tiny else TOKENS:
            for kind, lengths in (("one", [tokens]), ("chat", chat_lengths(tokens, seed=tokens))):
                act = partial(clock, record, name, kind, lengths)
                record.attempt("times", act, model=name, tokens=tokens, documents=kind)
    return record.exit_code()


def draw(record: Record, name: str, num_tokens: int) -> list[torch.Tensor]:
    """Return q (1, H, T, D), k and v (1, K, T, D) of a model."""
    model = architecture_of(name, is_tiny=record.is_tiny)
    generator = torch.Generator(record.device).manual_seed(num_tokens)
    return [
        torch.randn(
            1, heads, num_tokens, model.head_dim,
            device=record.device, dtype=record.dtype, generator=generator,
        ).requires_grad_()
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    ]  # fmt: skip


def attend(inputs: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """Run the engine's function over a row; returns (1, T, H, D)."""
    q, k, v = inputs
    function = ALL_ATTENTION_FUNCTIONS[VARLEN if q.device.type == "cuda" else PER_DOCUMENT]
    module = nn.Module()
    # What sdpa asks of the layer that calls it.
    vars(module).update(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    bounds = torch.tensor([0, *lengths], device=q.device).cumsum(0).to(torch.int32)
    output: torch.Tensor = function(
        module, q, k, v, None,
        cu_seq_lens_q=bounds, max_length_q=max(lengths), scaling=q.shape[-1] ** -0.5, dropout=0.0,
    )[0]  # fmt: skip
    return output


def plain(inputs: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """Attend in float32 within each document alone; returns (1, T, H, D)."""
    parts = []
    for q, k, v in zip(*(torch.split(x, list(lengths), dim=2) for x in inputs), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        parts.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
    return torch.cat(parts, 2).transpose(1, 2)


def compare(record: Record, name: str, lengths: Sequence[int]) -> None:
    """Compare output and gradients of a packed row."""
    inputs = draw(record, name, sum(lengths))
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = plain(exact, lengths)
    up = torch.randn_like(expected)
    wanted = [expected.detach(), *torch.autograd.grad(expected, exact, up)]
    poison(4 * expected.numel(), record.device)
    output = attend(inputs, lengths)
    found = [output.detach(), *torch.autograd.grad(output, inputs, up.to(record.dtype))]
    errors = {
        part: float((f.float() - e).norm() / e.norm())
        for part, f, e in zip(_NAMES, found, wanted, strict=True)
    }
    passed = all(error <= limit(record.dtype) for error in errors.values())
    record.row("equality", model=name, **errors, passed=passed)


def clock(record: Record, name: str, kind: str, lengths: Sequence[int]) -> None:
    """Time forward, and forward and backward."""
    inputs = draw(record, name, sum(lengths))
    heads, size = inputs[0].shape[1], inputs[0].shape[3]
    up = torch.randn(1, sum(lengths), heads, size, device=record.device, dtype=record.dtype)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return attend(inputs, lengths)

    values = timed("forward", forward, record.device)
    values |= timed(
        "both",
        lambda: torch.autograd.grad(attend(inputs, lengths), inputs, up),
        record.device,
    )
    flop = 2 * heads * size * sum(length**2 for length in lengths)
    rates = {
        f"{part}_tflops": None if (rate := per_second(times * flop, values, part)) is None
        else rate / 1e12
        for part, times in (("forward", 1.0), ("both", 3.5))
    }  # fmt: skip
    record.row(
        "times", model=name, tokens=sum(lengths), documents=kind, count=len(lengths),
        **values, **rates,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
