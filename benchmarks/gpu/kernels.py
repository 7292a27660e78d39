"""The kernels of a run on this card, and the gated delta rule at the heads of the five presets.

    python -m benchmarks.gpu.kernels [--out FOLDER] [--device cpu --tiny]

First the engine's own preflight, which lifts fla's refusal of Hopper cards where its self-test
passes. Then fla's results and gradients at real lengths, one document and packed ones, against
transformers' plain form in float32, document by document; and the times of both. On a CPU, where
fla cannot run, the plain form with chunks of another size stands in, so that the comparison is real.
"""

import importlib
import importlib.util
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks.gpu.clock import timed
from benchmarks.gpu.presets import PRESETS, architecture_of
from benchmarks.gpu.record import Record, arguments, checked
from workers.engine.kernels import preflight
from workers.engine.self_tests import limit

LENGTHS = {
    "1k": (1024,),
    "1k packed": (70, 321, 633),
    "8k": (8192,),
    "8k packed": (61, 700, 1530, 2048, 3853),
}
TINY_LENGTHS = {"tiny": (130,), "tiny packed": (33, 97)}
_NAMES = ("output", "q", "k", "v", "g", "beta")
# T tokens, H heads of keys, V heads of values, D head size

Rule = Callable[..., tuple[torch.Tensor, object]]


def main(argv: Sequence[str] | None = None) -> int:
    """Try and time everything; return 1 when a result is wrong."""
    record = Record("kernels", checked(arguments(__doc__), argv))
    guard = _guard()
    found = preflight(record.device)
    for kernel in found.kernels:
        record.row(
            "preflight", kernel=kernel.name, used=kernel.is_used, passed=kernel.works,
            error=kernel.error, ratio=kernel.ratio, version=kernel.version, note=kernel.note,
        )  # fmt: skip
    record.row("guard", refused_before=guard, refuses_now=_guard(), seconds=found.seconds)
    lengths = TINY_LENGTHS if record.is_tiny else LENGTHS
    for models, heads, head_dim in delta_nets(is_tiny=record.is_tiny):
        for name, documents in lengths.items():
            settings = {"models": models, "documents": name}
            for part, act in (("equality", compare), ("times", clock)):
                inputs = draw(record, heads, head_dim, sum(documents))
                measure = partial(act, record, settings, documents, inputs)
                record.attempt(f"delta rule, {part}", measure, **settings)
    return record.exit_code()


def delta_nets(*, is_tiny: bool) -> list[tuple[str, tuple[int, int], int]]:
    """Return models with the same delta net, its heads of keys and of values, and their size."""
    same = defaultdict[tuple[tuple[int, int], int], list[str]](list)
    for name in PRESETS:
        delta = architecture_of(name, is_tiny=is_tiny).delta_net
        assert delta is not None
        same[(delta.num_key_heads, delta.num_value_heads), delta.key_dim].append(name)
    return [(" ".join(names), heads, size) for (heads, size), names in same.items()]


def draw(
    record: Record, heads: tuple[int, int], head_dim: int, num_tokens: int
) -> list[torch.Tensor]:
    """Return q, k, v, g, beta of one row, seeded; states live for some fifty tokens."""
    generator = torch.Generator(record.device).manual_seed(num_tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, num_tokens, *shape, device=record.device, generator=generator)

    keys, values = heads
    q, k, v = normal(keys, head_dim), normal(keys, head_dim), normal(values, head_dim)
    g, beta = functional.logsigmoid(normal(values) + 4), normal(values).sigmoid()
    q, k, v, beta = (x.to(record.dtype) for x in (q, k, v, beta))
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


def compare(
    record: Record,
    settings: dict[str, Any],
    documents: Sequence[int],
    inputs: list[torch.Tensor],
) -> None:
    """Compare output and gradients with the plain form in float32, document by document."""
    exact = [x.detach().float().requires_grad_() for x in inputs]
    up = torch.randn(inputs[2].shape, device=record.device, dtype=record.dtype)
    expected = results(lambda: by_document(plain_rule(64), documents, exact), exact, up.float())
    found = results(lambda: tried_rule(record, documents, inputs), inputs, up)
    errors = {
        name: float((f.float() - e).norm() / e.norm())
        for name, f, e in zip(_NAMES, found, expected, strict=True)
    }
    # A comparison with NaN is False, so NaN does not pass.
    passed = all(error <= limit(record.dtype) for error in errors.values())
    record.row("delta rule, equality", **settings, **errors, passed=passed)


def clock(
    record: Record,
    settings: dict[str, Any],
    documents: Sequence[int],
    inputs: list[torch.Tensor],
) -> None:
    """Time forward, and forward and backward, of both forms."""
    up = torch.randn_like(inputs[2])
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "fla": lambda: tried_rule(record, documents, inputs),
        "plain": lambda: by_document(plain_rule(64), documents, inputs),
    }
    values: dict[str, Any] = {}
    for name, form in forms.items():
        with torch.no_grad():
            values |= timed(f"{name}_forward", form, record.device)

        def both(form: Callable[[], torch.Tensor] = form) -> list[torch.Tensor]:
            return results(form, inputs, up)

        values |= timed(f"{name}_both", both, record.device)
    record.row("delta rule, times", **settings, **values)


def results(
    form: Callable[[], torch.Tensor], inputs: list[torch.Tensor], up: torch.Tensor
) -> list[torch.Tensor]:
    """Return output and gradients of the inputs."""
    output = form()
    return [output.detach(), *torch.autograd.grad(output, inputs, up)]


def tried_rule(
    record: Record, documents: Sequence[int], inputs: list[torch.Tensor]
) -> torch.Tensor:
    """Run fla's rule over a row as the engine calls it; on a CPU the plain form in other chunks."""
    if record.device.type != "cuda":
        return by_document(plain_rule(32), documents, inputs)
    module: Any = importlib.import_module("fla.ops.gated_delta_rule")
    q, k, v, g, beta = inputs
    bounds = torch.tensor([0, *documents], device=record.device).cumsum(0).to(torch.int32)
    packed = {"cu_seqlens": bounds} if len(documents) > 1 else {}
    output: torch.Tensor = module.chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, **packed
    )[0]
    return output


def plain_rule(chunk_size: int) -> Rule:
    """Return transformers' form in plain torch."""
    plain: Rule = inspect.unwrap(torch_chunk_gated_delta_rule)

    def compute(*qkv: torch.Tensor, **gates: torch.Tensor) -> tuple[torch.Tensor, object]:
        return plain(*qkv, **gates, chunk_size=chunk_size, use_qk_l2norm_in_kernel=True)

    return compute


def by_document(rule: Rule, documents: Sequence[int], inputs: list[torch.Tensor]) -> torch.Tensor:
    """Apply a rule to each document alone."""
    parts = zip(*(torch.split(x, list(documents), dim=1) for x in inputs), strict=True)
    return torch.cat([rule(q, k, v, g=g, beta=beta)[0] for q, k, v, g, beta in parts], 1)


def _guard() -> bool | None:
    """Return whether fla refuses Hopper cards in this process; None without fla."""
    if importlib.util.find_spec("fla") is None:
        return None
    return bool(vars(importlib.import_module("fla.ops.common.chunk_o")).get("IS_NVIDIA_HOPPER"))


if __name__ == "__main__":
    sys.exit(main())
