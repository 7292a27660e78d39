"""Self-tests of kernels find wrong ones, and a run that would be wrong or slow is refused."""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen3_next import modeling_qwen3_next

from studio.disk import TEMPLATES
from studio.domain.architecture import read_architecture
from studio.domain.kernels import Kernel, Kernels
from studio.domain.preset import load_models
from studio.domain.spec import parse_spec
from studio.errors import EngineError
from workers.engine import kernel_speed, self_tests
from workers.engine.kernels import needed_by, preflight, prove_kernels, refuse_unfit

ALL = frozenset(("delta_rule", "convolution", "attention", "grouped_matmul", "nf4"))
CPU, FLOAT = torch.device("cpu"), torch.float32
# transformers' own plain form, without its wrapper that refuses packed documents.
CHUNKED: Callable[..., Any] = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)


def by_document(q: Any, k: Any, v: Any, g: Any, beta: Any, cu_seqlens: Any, **more: Any) -> Any:
    parts = [
        CHUNKED(*(x[:, a:b] for x in (q, k, v)), g=g[:, a:b], beta=beta[:, a:b], **more)[0]
        for a, b in pairwise(cu_seqlens.tolist())
    ]
    return torch.cat(parts, 1), None


def delta_rule(q: Any, k: Any, v: Any, **more: Any) -> Any:
    return by_document(q, k, v, **more)


def leaking(q: Any, k: Any, v: Any, **more: Any) -> Any:
    return CHUNKED(q, k, v, **more)  # takes no heed of cu_seqlens


def wrong_gradient(q: Any, k: Any, v: Any, **more: Any) -> Any:
    return by_document(q, k * 0.5 + k.detach() * 0.5, v, **more)


def test_the_plain_delta_rule_of_transformers_equals_the_token_by_token_one() -> None:
    error = self_tests.delta_rule_error(delta_rule, CPU, FLOAT, head_dim=32)
    assert error < self_tests.LIMIT_32BIT


@pytest.mark.parametrize("wrong", [leaking, wrong_gradient])
def test_a_delta_rule_that_leaks_or_has_a_wrong_gradient_is_found(wrong: Any) -> None:
    error = self_tests.delta_rule_error(wrong, CPU, FLOAT, head_dim=32)
    assert error > 10 * self_tests.LIMIT_16BIT


def convolve(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    parts = []
    for a, b in pairwise(ends.tolist()):
        padded = functional.pad(x[:, a:b].transpose(1, 2), (weight.shape[1] - 1, 0))
        parts.append(
            functional.silu(
                functional.conv1d(padded, weight[:, None], groups=x.shape[2])
            ).transpose(1, 2)
        )
    return torch.cat(parts, 1)


def test_a_convolution_that_leaks_is_found() -> None:
    def leaks(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return convolve(x, weight, ends[[0, -1]])

    assert self_tests.convolution_error(convolve, CPU, FLOAT) < self_tests.LIMIT_32BIT
    assert self_tests.convolution_error(leaks, CPU, FLOAT) > self_tests.LIMIT_16BIT


def attend(q: Any, k: Any, v: Any, ends: Any, _longest: int) -> torch.Tensor:
    parts = []
    for a, b in pairwise(ends.tolist()):
        rows = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
        found = functional.scaled_dot_product_attention(
            rows[0], rows[1], rows[2], is_causal=True, enable_gqa=True
        )
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)


def test_an_attention_that_leaks_is_found() -> None:
    def leaks(q: Any, k: Any, v: Any, ends: Any, longest: int) -> torch.Tensor:
        return attend(q, k, v, ends[[0, -1]], longest)

    assert self_tests.attention_error(attend, CPU, FLOAT) < self_tests.LIMIT_32BIT
    assert self_tests.attention_error(leaks, CPU, FLOAT) > self_tests.LIMIT_16BIT


def test_products_that_mix_up_two_groups_are_found() -> None:
    def mixed_up(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return functional.grouped_mm(x, weight.flip(0).transpose(-2, -1), offs=ends)

    assert self_tests.grouped_matmul_error(mixed_up, CPU, FLOAT) > self_tests.LIMIT_16BIT


def test_rounding_to_other_numbers_than_those_of_nf4_is_found() -> None:
    def linear(weight: torch.Tensor) -> torch.Tensor:
        scale = weight.abs().amax() / 7
        return (weight / scale).round() * scale

    assert self_tests.nf4_error(linear, CPU, FLOAT) > self_tests.LIMIT_16BIT


def test_on_a_cpu_products_and_4_bits_are_tried_and_the_rest_is_said_not_to_be_used() -> None:
    kernels = preflight(CPU)

    assert {k.name for k in kernels.kernels if k.works} == {"grouped_matmul", "nf4"}
    assert all(k.note for k in kernels.kernels if not k.is_used)
    assert not kernels.broken
    assert Kernels.model_validate_json(kernels.model_dump_json()) == kernels
    refuse_unfit(kernels, needed=ALL, accept_slow=False)


def test_the_proof_counts_what_the_run_uses() -> None:
    kernels = preflight(CPU)
    one, two = prove_kernels(kernels, frozenset(("nf4",))), prove_kernels(kernels, ALL)
    none = prove_kernels(kernels, frozenset(("delta_rule",)))

    assert (one.passed, two.passed, none.passed) == (True, True, None)
    assert one.summary.startswith("The fast kernel of this run (4-bit weights) agrees with plain")
    assert two.summary.startswith("The 2 fast kernels of this run (")
    assert none.summary == "No fast kernel is used by this run on this CPU."


@pytest.mark.parametrize(
    ("error", "words"),
    [(0.004, "4e-03"), (0.0041, "5e-03"), (0.0096, "1e-02"), (0.0, "within 0 on")],
)
def test_the_difference_is_never_said_to_be_smaller_than_it_is(error: float, words: str) -> None:
    assert words in prove_kernels(on_a_card(error=error), ALL).summary


def test_the_proof_names_a_kernel_that_is_wrong_or_missing() -> None:
    wrong = prove_kernels(on_a_card(works=False, note="no symbol"), ALL)
    missing = prove_kernels(on_a_card(is_used=False, works=None, note="it is not installed"), ALL)

    assert wrong.passed is False
    assert wrong.summary == "Not right: Gated DeltaNet (no symbol)."
    assert prove_kernels(on_a_card(works=False), frozenset(("nf4",))).passed is None
    assert missing.passed is None
    assert missing.summary.endswith("Gated DeltaNet runs in its plain form: it is not installed.")


@pytest.mark.parametrize(
    ("model", "changes", "needed"),
    [
        ("tiny/qwen3", {"method": "lora"}, set()),
        ("tiny/qwen3", {"method": "auto"}, {"nf4"}),
        ("tiny/qwen3", {"method": "full", "batch": {"packing": True}}, {"attention"}),
        ("tiny/qwen3.5", {"method": "lora"}, {"delta_rule"}),
        ("tiny/qwen3-next", {"method": "qlora", "batch": {"packing": True}}, ALL),
    ],
)
def test_what_a_run_needs_follows_from_its_spec_and_model(
    model: str, changes: dict[str, Any], needed: set[str]
) -> None:
    spec = parse_spec({"batch": {"packing": False}} | changes)
    config = load_models(TEMPLATES / "models")[model].config
    assert needed_by(spec, read_architecture(config)) == needed


def on_a_card(**changes: Any) -> Kernels:
    values: dict[str, Any] = {
        "name": "delta_rule",
        "title": "Gated DeltaNet",
        "package": "fla-core",
        "version": "0.6.0",
        "is_used": True,
        "works": True,
    }
    return Kernels(
        device="NVIDIA H200",
        versions={},
        kernels=(Kernel.model_validate(values | changes),),
        seconds=1.0,
    )


def test_a_wrong_kernel_is_refused_whatever_the_user_accepts() -> None:
    kernels = on_a_card(works=False, note="its results differ by 0.4")
    with pytest.raises(EngineError, match=r"fla-core 0\.6\.0\) does not work on this NVIDIA H200"):
        refuse_unfit(kernels, needed=ALL, accept_slow=True)
    refuse_unfit(kernels, needed=frozenset(("nf4",)), accept_slow=False)


def test_a_slow_replacement_on_a_gpu_is_refused_unless_it_is_accepted() -> None:
    kernels = on_a_card(version=None, is_used=False, works=None, note="fla-core is not installed")
    with pytest.raises(EngineError, match="many times slower") as caught:
        refuse_unfit(kernels, needed=ALL, accept_slow=False)
    assert caught.value.field == "train.accept_slow_kernels"
    refuse_unfit(kernels, needed=ALL, accept_slow=True)
    refuse_unfit(kernels, needed=frozenset(("nf4",)), accept_slow=False)


def test_the_speed_of_every_kernel_can_be_compared_with_the_plain_form() -> None:
    # What is timed here are two plain forms; that a ratio comes out is all that a CPU can show.
    def chunked(q: Any, k: Any, v: Any, **more: Any) -> Any:
        return CHUNKED(q, k, v, **more)

    found = [
        kernel_speed.delta_rule_speed(chunked, CPU, 64),
        kernel_speed.convolution_speed(convolve, CPU, 64),
        kernel_speed.attention_speed(attend, CPU, 64),
        kernel_speed.grouped_matmul_speed(
            lambda x, w, ends: functional.grouped_mm(x, w.transpose(-2, -1), offs=ends), CPU, 64
        ),
    ]
    assert all(ratio > 0 for ratio in found)
