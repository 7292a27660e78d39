"""The proof that packed documents do not see each other: true where they do not, false where."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.workers.engine.families import (
    DELTA_NET_FAMILIES,
    FAMILIES,
    documents,
    tiny,
    with_lora,
)
from tests.workers.engine.test_varlen import BREAKS, leak
from workers.engine.batches import collate
from workers.engine.leak import prove_leak
from workers.engine.varlen import enable_packing

__all__ = ["leak"]
LENGTHS = (40, 3, 50, 20)


def row() -> Any:
    return collate(documents(LENGTHS), 0, packed=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_that_are_apart_pass(family: str) -> None:
    model = with_lora(tiny(family)).train()
    enable_packing(model)
    proof = prove_leak(model, row())
    assert (proof.name, proof.passed) == ("leak", True)
    assert proof.details["moved_first"] > 0.1
    assert proof.details["tolerance"] == 1e-5
    # Without experts, whose tokens are sorted together, nothing moves at all.
    if "moe" not in family and family != "qwen3_next":
        assert proof.details["moved_others"] == 0.0
    assert proof.summary.startswith("4 examples in one row do not see each other: changing the ")
    assert model.training, "the mode is as before"


@pytest.mark.parametrize("family", FAMILIES)
def test_they_pass_in_sixteen_bits_too(family: str) -> None:
    model: Any = tiny(family)
    model.to(torch.bfloat16)
    enable_packing(model)
    assert prove_leak(model, row()).passed is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "part"), BREAKS)
def test_each_leak_fails(
    family: str, part: str, dtype: torch.dtype, leak: Callable[[str], None]
) -> None:
    leak(part)
    model: Any = tiny(family)
    model.to(dtype)
    enable_packing(model)
    proof = prove_leak(model, row())
    assert proof.passed is False
    assert proof.details["moved_others"] > 3 * proof.details["tolerance"]
    assert proof.summary.startswith("4 examples in one row see each other: changing the first ")


def test_the_other_parts_of_the_row_do_not_hide_a_leak_into_one(
    leak: Callable[[str], None],
) -> None:
    leak("convolution")
    model = tiny(DELTA_NET_FAMILIES[0])
    enable_packing(model)
    # Only the first three tokens of the second document see the first one's last.
    batch = collate(documents((3, 200, 100)), 0, packed=True)
    assert prove_leak(model, batch).passed is False


def test_a_model_that_says_the_same_to_all_proves_nothing() -> None:
    model: Any = tiny("qwen3")
    enable_packing(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = model.get_input_embeddings().weight[0].clone()
    proof = prove_leak(model, row())
    assert proof.passed is False
    assert proof.summary.startswith("Nothing is shown")


def test_one_example_has_nobody_to_leak_into() -> None:
    model = tiny("qwen3")
    enable_packing(model)
    alone = prove_leak(model, collate(documents((30,)), 0, packed=True))
    padded = prove_leak(model, collate(documents((30, 20)), 0, packed=False))
    assert (alone.passed, padded.passed) == (None, None)
    assert "one example" in alone.summary
    assert "padded" in padded.summary


def test_noise_of_the_model_itself_is_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU that adds in another order each time: the tolerance grows, a leak still shows."""
    for is_leaky in (False, True):
        model = tiny("qwen3")
        enable_packing(model)
        norm: Any = model.get_decoder().norm  # type: ignore[no-untyped-call]
        source = torch.Generator().manual_seed(5)

        norm.register_forward_hook(jitter(source))
        if is_leaky:
            model.set_attn_implementation("sdpa")
            monkeypatch.setattr("workers.engine.batches.MicroBatch.inputs", without_positions)
        proof = prove_leak(model, row())
        assert proof.details["noise"] > 1e-4
        assert proof.passed is not is_leaky


def jitter(source: torch.Generator) -> Callable[..., torch.Tensor]:
    def add(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 1e-3 * torch.randn(output.shape, generator=source)

    return add


def without_positions(batch: Any) -> dict[str, Any]:
    return {"input_ids": batch.tokens}


@pytest.fixture(autouse=True)
def _keep_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield
