"""A packed micro-batch is the sum of its documents, in every family, and whatever runs it."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from studio.errors import EngineError
from studio.tokens.examples import Example
from tests.workers.engine.families import (
    DELTA_NET_FAMILIES,
    FAMILIES,
    VOCABULARY,
    documents,
    tiny,
    with_lora,
)
from workers.engine import attention, varlen
from workers.engine.batches import MicroBatch, collate, count_supervised
from workers.engine.loss import batch_loss
from workers.engine.varlen import disable_packing, enable_packing

# Shorter than the convolution's kernel; around a whole chunk of 64; two with as many chunks.
LENGTHS = (70, 1, 3, 64, 2, 65, 30)
Found = tuple[float, dict[str, torch.Tensor]]


def measured(model: torch.nn.Module, batches: Sequence[MicroBatch], num_supervised: int) -> Found:
    """Loss and gradients of some micro-batches together."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = batch_loss(model, batch, num_supervised)  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    named = model.named_parameters()
    return total, {name: p.grad.clone() for name, p in named if p.grad is not None}


def distance(found: Found, wanted: Found) -> float:
    """Largest relative difference of the loss and of the gradients, in the norm of each tensor."""
    assert found[1].keys() == wanted[1].keys()
    assert found[1]
    # The gradient of a parameter that hardly matters is compared with the largest one's rounding.
    least = 1e-3 * max(float(gradient.norm()) for gradient in wanted[1].values())
    differences = [
        float((found[1][name] - gradient).norm()) / max(least, float(gradient.norm()))
        for name, gradient in wanted[1].items()
    ]
    return max([abs(found[0] - wanted[0]) / abs(wanted[0]), *differences])


def packed_and_alone(model: torch.nn.Module, examples: list[Example]) -> tuple[Found, Found]:
    count = count_supervised(examples)
    alone = [collate([example], 0, packed=False) for example in examples]
    packed = measured(model, [collate(examples, 0, packed=True)], count)
    return packed, measured(model, alone, count)


@pytest.mark.parametrize("kind", ["base", "lora", "lora, recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_micro_batch_is_the_sum_of_its_documents(family: str, kind: str) -> None:
    base = tiny(family)
    model: Any = base if kind == "base" else with_lora(base)
    assert "attention: per document" in enable_packing(model)
    if kind == "lora, recomputed":
        base.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
        model.train()
    examples = documents(LENGTHS)
    packed, alone = packed_and_alone(model, examples)
    assert distance(packed, alone) < 1e-5
    padded = measured(model, [collate(examples, 0, packed=False)], count_supervised(examples))
    assert distance(packed, padded) < 1e-5


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    found = {family: tiny(family) for family in FAMILIES}
    for model in found.values():
        enable_packing(model)
    return found


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(FAMILIES),
    lengths=st.lists(st.integers(2, 140), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_whatever_the_lengths(
    models: dict[str, PreTrainedModel], family: str, lengths: list[int], seed: int
) -> None:
    examples = documents(lengths, seed)
    if count_supervised(examples):
        assert distance(*packed_and_alone(models[family], examples)) < 1e-5


# ---- each way to leak, on purpose -------------------------------------------------------------


def leaky_convolution(plain: Callable[..., Any]) -> Callable[..., Any]:
    reference = inspect.unwrap(plain)
    return lambda *args, cu_seq_lens_q=None, **more: reference(*args, **more)


def leaky_rule(plain: Callable[..., Any]) -> Callable[..., Any]:
    reference = inspect.unwrap(plain)
    return lambda *args, cu_seqlens=None, **more: reference(*args, **more)


def leaky_attention(*inputs: Any, **options: Any) -> Any:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](*inputs, **options)


@pytest.fixture
def leak(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Break one part of what keeps documents apart."""

    def break_it(part: str) -> None:
        if part == "convolution":
            monkeypatch.setattr(varlen, "_convolution", leaky_convolution)
        elif part == "delta rule":
            monkeypatch.setattr(varlen, "_delta_rule", leaky_rule)
        else:
            ALL_ATTENTION_FUNCTIONS.register(attention.PER_DOCUMENT, leaky_attention)

    whole = ALL_ATTENTION_FUNCTIONS[attention.PER_DOCUMENT]
    yield break_it
    ALL_ATTENTION_FUNCTIONS.register(attention.PER_DOCUMENT, whole)


PARTS = ("convolution", "delta rule", "attention")
BREAKS = [
    (family, part)
    for family in FAMILIES
    for part in PARTS
    if part == "attention" or family in DELTA_NET_FAMILIES
]


@pytest.mark.parametrize(("family", "part"), BREAKS)
def test_a_leak_in_any_part_is_seen(family: str, part: str, leak: Callable[[str], None]) -> None:
    leak(part)
    model = tiny(family)
    enable_packing(model)
    assert distance(*packed_and_alone(model, documents(LENGTHS))) > 1e-3


def test_positions_that_run_on_are_seen() -> None:
    model = tiny("qwen3")
    enable_packing(model)
    examples = documents((40, 50))
    batch = collate(examples, 0, packed=True)
    assert batch.packed is not None
    batch.packed.positions[0] = torch.arange(90)
    # Rotary positions are relative: whole documents may be shifted, but not torn.
    batch.packed.positions[0, 60:] += 7
    count = count_supervised(examples)
    alone = measured(model, [collate([example], 0, packed=False) for example in examples], count)
    assert distance(measured(model, [batch], count), alone) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", DELTA_NET_FAMILIES)
def test_transformers_alone_refuses_or_leaks(family: str) -> None:
    """The reason why this module exists; where it fails one day, part of it can go."""
    model, examples = tiny(family), documents((40, 50))
    batch = collate(examples, 0, packed=True)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        batch_loss(model, batch, 1)
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    assert batch.packed is not None
    by_positions = decoder(batch.tokens, position_ids=batch.packed.positions, use_cache=False)
    enable_packing(model)
    apart = decoder(**batch.inputs(), use_cache=False)
    moved = (by_positions.last_hidden_state - apart.last_hidden_state)[0].norm(dim=-1)
    assert float(moved[:40].max()) < 1e-4
    assert float(moved[40:].max()) > 0.1


# ---- everything else is as before -------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_and_generation_are_unchanged(family: str) -> None:
    model: Any = tiny(family).eval()  # type: ignore[no-untyped-call]
    torch.manual_seed(2)
    tokens = torch.randint(1, VOCABULARY, (3, 12))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            written: Any = model.generate(
                tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            return [written, model(tokens, attention_mask=mask).logits, model(tokens).logits]

    before = outputs()
    enable_packing(model)
    for found, wanted in zip(outputs(), before, strict=True):
        assert torch.equal(found, wanted)


def test_it_is_taken_back_and_touches_no_other_model() -> None:
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    names = ("causal_conv1d_fn", "torch_chunk_gated_delta_rule")
    before = [getattr(module, name) for name in names]
    model, other = tiny("qwen3_next"), tiny("qwen3_next")
    enable_packing(model)
    enable_packing(model)
    batch = collate(documents((20, 30)), 0, packed=True)
    batch_loss(model, batch, 1)
    assert [getattr(module, name) for name in names] == before
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        batch_loss(other, batch, 1)
    disable_packing(model)
    assert model.config._attn_implementation == "sdpa"  # noqa: SLF001
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        batch_loss(model, batch, 1)


def test_a_sliding_window_is_refused() -> None:
    model = tiny("qwen3_moe")
    model.config.sliding_window = 8
    with pytest.raises(EngineError, match="sliding window \\(8 tokens\\)") as caught:
        enable_packing(model)
    assert caught.value.field == "batch.packing"


def test_a_layer_that_was_written_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_next")
    layer = type(varlen.delta_nets(model)[0])
    monkeypatch.setattr(layer, "forward", lambda self, x: x)
    with pytest.raises(EngineError, match="does not call causal_conv1d_fn"):
        enable_packing(model)


def test_no_mask_of_tokens_by_tokens_is_made() -> None:
    model = tiny("qwen3")
    enable_packing(model)
    seen: list[Any] = []
    whole = ALL_ATTENTION_FUNCTIONS[attention.PER_DOCUMENT]

    def watch(module: Any, q: Any, k: Any, v: Any, mask: Any, **more: Any) -> Any:
        seen.append(mask)
        return whole(module, q, k, v, mask, **more)

    ALL_ATTENTION_FUNCTIONS.register(attention.PER_DOCUMENT, watch)
    try:
        batch_loss(model, collate(documents((20, 30)), 0, packed=True), 1)
        batch_loss(model, collate(documents((20, 30)), 0, packed=False), 1)
    finally:
        ALL_ATTENTION_FUNCTIONS.register(attention.PER_DOCUMENT, whole)
    assert [mask is None for mask in seen] == [True, True, False, False]


def test_varlen_attention_is_called_as_this_torch_wants_it() -> None:
    """Shapes only, on the meta device: the kernel itself needs a GPU."""
    q = torch.empty(1, 4, 50, 32, device="meta", dtype=torch.bfloat16)
    k, v = (torch.empty(1, 2, 50, 32, device="meta", dtype=torch.bfloat16) for _ in range(2))
    bounds = torch.tensor([0, 20, 50], dtype=torch.int32, device="meta")
    attend = ALL_ATTENTION_FUNCTIONS[attention.VARLEN]
    options = {"scaling": 32**-0.5, "cu_seq_lens_q": bounds, "max_length_q": 30, "dropout": 0.0}
    found, _ = attend(torch.nn.Module(), q, k, v, None, **options)
    assert found.shape == (1, 50, 4, 32)
