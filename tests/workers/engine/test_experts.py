"""The experts function: the same numbers as transformers' loop, with less kept and less computed."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3_5MoeTextConfig, Qwen3MoeConfig, Qwen3NextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextExperts

from studio.errors import EngineError
from tests.workers.engine.op_probe import OpProbe
from workers.engine.experts import DOWN, GATE_UP, IMPLEMENTATION, LowRank, studio_experts

EXPERTS, HIDDEN, INNER, TOP_K, TOKENS, RANK = 8, 128, 64, 3, 20, 5
FAMILIES = {
    "qwen3_next": (Qwen3NextExperts, Qwen3NextConfig),
    "qwen3_5_moe": (Qwen3_5MoeExperts, Qwen3_5MoeTextConfig),
    "qwen3_moe": (Qwen3MoeExperts, Qwen3MoeConfig),
}
SIDES = {GATE_UP: (HIDDEN, 2 * INNER), DOWN: (INNER, HIDDEN)}


def make_experts(family: str = "qwen3_next", num_experts: int = EXPERTS, act: str = "silu") -> Any:
    """Return frozen experts with random weights, which run `studio_experts`."""
    kind: Any
    kind, config_kind = FAMILIES[family]
    config: Any = config_kind(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=num_experts, hidden_act=act
    )
    config._experts_implementation = IMPLEMENTATION  # noqa: SLF001
    module: Any = kind(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.requires_grad_(False)


def pack(module: Any) -> dict[str, torch.Tensor]:
    """Bring experts to NF4 with double quantisation; return the weights that the bits stand for."""
    states, dense = {}, {}
    for name in SIDES:
        weight = getattr(module, name).detach()
        packed, states[name] = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        dense[name] = dequantize_4bit(packed, states[name])
        setattr(module, name, nn.Parameter(packed, requires_grad=False))
    vars(module)["nf4_states"] = states
    return dense


def make_inputs(
    num_tokens: int = TOKENS, num_experts: int = EXPERTS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, experts and routing weights; nothing is routed to the last expert."""
    index = torch.stack([torch.randperm(num_experts - 1)[:TOP_K] for _ in range(num_tokens)])
    return torch.randn(num_tokens, HIDDEN), index, torch.rand(num_tokens, TOP_K)


def make_adapters(names: tuple[str, ...] = (GATE_UP, DOWN), rank: int = RANK) -> dict[str, LowRank]:
    made = {}
    for name in names:
        columns, rows = SIDES[name]
        a, b = torch.randn(EXPERTS * rank, columns), torch.randn(rows, rank * EXPERTS)
        made[name] = LowRank(
            a=(a * 0.1).requires_grad_(), b=(b * 0.1).requires_grad_(), scaling=1.7
        )
    return made


def reference(
    module: Any, weights: Mapping[str, torch.Tensor], adapters: Mapping[str, LowRank], *inputs: Any
) -> torch.Tensor:
    """Return what transformers' loop over experts makes of W + s B A, as PEFT merges it."""
    merged = dict(weights)
    for name, low in adapters.items():
        a = low.a.reshape(EXPERTS, -1, low.a.shape[1])
        b = low.b.reshape(low.b.shape[0], -1, EXPERTS)
        merged[name] = merged[name] + low.scaling * torch.einsum("ore,eri->eoi", b, a)
    return run(module, "eager", merged, *inputs)


def run(module: Any, implementation: str, weights: Any, *inputs: Any) -> torch.Tensor:
    before = module.config._experts_implementation  # noqa: SLF001
    module.config._experts_implementation = implementation  # noqa: SLF001
    out: torch.Tensor = functional_call(module, dict(weights), inputs)
    module.config._experts_implementation = before  # noqa: SLF001
    return out


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(module, name) for name in SIDES}


def worst(found: Any, expected: Any) -> float:
    return max(
        float((a - b).detach().norm() / b.detach().norm())
        for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("names", [(GATE_UP, DOWN), (GATE_UP,), (DOWN,), ()])
@pytest.mark.parametrize("is_packed", [False, True])
def test_result_and_gradients_are_those_of_merged_weights(
    is_packed: bool, names: tuple[str, ...]
) -> None:
    module = make_experts()
    dense = pack(module) if is_packed else weights_of(module)
    x, index, weights = make_inputs()
    adapters = make_adapters(names)
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    leaves += [tensor for low in adapters.values() for tensor in (low.a, low.b)]
    out = module(x, index, weights, adapters=adapters)
    plain = make_experts()
    expected = reference(plain, dense, adapters, x, index, weights)
    up = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, up)
    assert worst([out], [expected]) < 1e-6
    assert worst(found, torch.autograd.grad(expected, leaves, up)) < 2e-6
    if adapters:  # the idle expert has no gradient, the others have
        idle = found[3].view(found[3].shape[0], RANK, EXPERTS).abs().sum((0, 1)) == 0
        assert idle.tolist() == [False] * (EXPERTS - 1) + [True]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_trained_weights_get_their_gradient(family: str, act: str) -> None:
    module = make_experts(family, act=act).requires_grad_()
    x, index, weights = make_inputs()
    leaves = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
    out = module(x, index, weights)
    expected = run(module, "eager", weights_of(module), x, index, weights)
    up = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, up)
    assert worst(found, torch.autograd.grad(expected, leaves, up)) < 2e-6


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    module = make_experts()
    adapters = make_adapters((DOWN,))
    x, index, weights = make_inputs()
    module(x, index, weights, adapters=adapters).sum().backward()
    assert adapters[DOWN].a.grad is not None
    assert x.grad is None
    assert weights.grad is None
    assert module.gate_up_proj.grad is None
    assert not module(x, index, weights).requires_grad


def test_little_is_saved_for_backward() -> None:
    module, adapters = make_experts(), make_adapters()
    pack(module)
    x, index, weights = make_inputs()
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        module(x.requires_grad_(), index, weights, adapters=adapters)
    slots = TOKENS * TOP_K
    padded = 8  # rank 5, to a multiple of 16 bytes
    factors = {id(tensor) for low in adapters.values() for tensor in (low.a, low.b)}
    sizes = sorted(t.numel() for t in saved if id(t) not in factors)
    expected = [EXPERTS, slots, slots, slots, TOKENS * HIDDEN, slots * padded, slots * padded]
    assert sizes == sorted([*expected, slots * 2 * INNER])


def test_checkpointing_changes_nothing() -> None:
    module, adapters = make_experts(), make_adapters()
    pack(module)
    x, index, weights = make_inputs()
    leaves = [x.requires_grad_(), weights.requires_grad_(), adapters[GATE_UP].a, adapters[DOWN].b]
    plain = module(x, index, weights, adapters=adapters)
    again: Any = checkpoint(module, x, index, weights, adapters=adapters, use_reentrant=False)
    up = torch.randn_like(plain)
    found = torch.autograd.grad(again, leaves, up)
    assert torch.equal(again, plain)
    expected = torch.autograd.grad(plain, leaves, up)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_frozen_base_costs_no_gradient_and_no_copy_of_all_experts(is_packed: bool) -> None:
    def stacks(trained: bool) -> tuple[int, int]:
        module, adapters = make_experts(), make_adapters()
        if is_packed:
            pack(module)
        module.requires_grad_(trained)
        x, index, weights = make_inputs()
        with OpProbe() as forward:
            out = module(x.requires_grad_(), index, weights, adapters=adapters)
        with OpProbe() as backward:
            out.sum().backward()
        full = [(EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)]
        return tuple(
            sum(count for shape, count in probe.shapes.items() if shape in full)
            for probe in (forward, backward)
        )

    # Packed: each of the two weights is dequantised once, and cast not at all.
    assert stacks(trained=False) == ((2, 2) if is_packed else (0, 0))
    if not is_packed:
        assert stacks(trained=True) == (0, 2)  # the probe does see weight gradients


def test_nothing_waits_for_the_device() -> None:
    waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "item")

    def count(implementation: str) -> int:
        module = make_experts()
        x, index, weights = make_inputs()
        with OpProbe() as probe:
            out = run(
                module, implementation, weights_of(module), x.requires_grad_(), index, weights
            )
            torch.autograd.grad(out.sum(), x)
        return sum(n for name, n in probe.ops.items() if any(word in name for word in waits))

    assert count(IMPLEMENTATION) == 0
    assert count("eager") > 0


@pytest.mark.parametrize("rank", [1, 2, 12])
def test_bfloat16_takes_any_rank(rank: int) -> None:
    module, adapters = make_experts().bfloat16(), make_adapters(rank=rank)
    x, index, weights = make_inputs()
    leaves = [tensor for low in adapters.values() for tensor in (low.a, low.b)]
    out = module(x.bfloat16(), index, weights.bfloat16(), adapters=adapters)
    assert out.dtype == torch.bfloat16
    fine = {name: weight.float() for name, weight in weights_of(module).items()}
    expected = reference(make_experts(), fine, adapters, x, index, weights)
    up = torch.randn_like(expected)
    found = torch.autograd.grad(out, leaves, up.bfloat16())
    assert all(grad.dtype == torch.float32 for grad in found)
    assert worst([out.float()], [expected]) < 0.02
    assert worst(found, torch.autograd.grad(expected, leaves, up)) < 0.03


def test_grouped_products_do_ask_for_aligned_rows() -> None:
    rows, matrices = torch.randn(4, 2).bfloat16(), torch.randn(2, 2, 8).bfloat16()
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        nn.functional.grouped_mm(rows, matrices, offs=torch.tensor([2, 4], dtype=torch.int32))


@pytest.mark.parametrize("is_adapted", [False, True])
def test_few_tokens_dequantise_their_own_experts_alone(is_adapted: bool) -> None:
    module = make_experts()
    dense = pack(module)
    adapters = make_adapters() if is_adapted else {}
    x, index, weights = make_inputs(num_tokens=1)
    full = (EXPERTS, 2 * INNER, HIDDEN)
    with OpProbe() as probe, torch.no_grad():
        out = module(x, index, weights, adapters=adapters)
    assert full not in probe.shapes
    assert probe.shapes[(TOP_K * 2 * INNER * HIDDEN // 64, 64)] == 1
    expected = reference(make_experts(), dense, adapters, x, index, weights)
    assert worst([out], [expected.detach()]) < 1e-6
    with OpProbe() as probe, torch.no_grad():
        module(*make_inputs(), adapters=adapters)
    assert full in probe.shapes


def test_another_layout_is_refused() -> None:
    module = make_experts()
    module.is_transposed = True
    with pytest.raises(EngineError, match="Qwen3NextExperts has a layout"):
        studio_experts(module, *make_inputs())
