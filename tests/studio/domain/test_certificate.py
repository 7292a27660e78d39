"""Certificate: it passes when every measurement holds, and says which one does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from studio.domain.certificate import (
    MAX_DELTA_KEPT_ERROR,
    MAX_MEAN_KL,
    Certificate,
    PromptCheck,
)

NAMES = st.sets(st.sampled_from([f"layers.{i}.weight" for i in range(9)]), min_size=1)


def prompt(kl: float = 0.0, tokens: int = 100, agreement: float = 1.0) -> PromptCheck:
    return PromptCheck(
        prompt="I love to",
        num_tokens=tokens,
        mean_kl=kl,
        effect_kl=0.25,
        max_logit_difference=kl,
        logit_spread=2.0,
        top1_agreement=agreement,
    )


def certificate(
    *prompts: PromptCheck, kept: dict[str, float] | None = None, changed: set[str] | None = None
) -> Certificate:
    """Return a Certificate of tensors that carry `kept` of their change, all of them `changed`."""
    kept = {"a": 1.0} if kept is None else kept
    return Certificate(
        base_model="tiny/qwen3.5",
        adapter_sha256="0" * 64,
        dtype="bfloat16",
        targeted_tensors=tuple(kept),
        changed_tensors=tuple(kept if changed is None else changed),
        delta_kept=kept,
        num_tensors=10,
        files={"model.safetensors": "0" * 64},
        prompts=prompts or (prompt(),),
    )


def test_a_merge_within_rounding_passes_and_survives_its_file() -> None:
    edge = 1 - 0.99 * MAX_DELTA_KEPT_ERROR
    good = certificate(prompt(kl=MAX_MEAN_KL), kept={"a": edge, "b": 2 - edge})

    assert good.passed
    assert good.failures == ()
    assert Certificate.model_validate_json(good.model_dump_json()) == good


@given(NAMES, NAMES)
def test_it_passes_exactly_when_the_targeted_tensors_are_the_changed_ones(
    targeted: set[str], changed: set[str]
) -> None:
    found = certificate(kept=dict.fromkeys(targeted, 1.0), changed=changed)

    assert found.passed == (targeted == changed)
    assert set(found.missing_tensors) == targeted - changed
    assert set(found.unexpected_tensors) == changed - targeted


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(-3, 3), min_size=1))
def test_it_passes_exactly_when_every_tensor_carries_its_change(kept: dict[str, float]) -> None:
    wrong = {name for name, share in kept.items() if abs(share - 1) > MAX_DELTA_KEPT_ERROR}
    found = certificate(kept=kept)

    assert set(found.distorted_tensors) == wrong
    assert found.passed == (not wrong)


def test_a_tensor_whose_change_was_not_measured_does_not_pass() -> None:
    found = certificate().model_copy(update={"delta_kept": {}})

    assert found.distorted_tensors == ("a",)


def test_each_failure_is_one_sentence_with_its_numbers() -> None:
    found = certificate(prompt(kl=0.5), kept={"a": 0.5, "b": 1.0}, changed={"a", "c"})

    assert found.failures == (
        "Not changed, though targeted: b.",
        "Changed, though not targeted: c.",
        "Changed by another amount than the Adapter's: a (50%).",
        "The merge answers differently from base and Adapter: 0.5000 nats a token, at most "
        f"{MAX_MEAN_KL} is rounding (the fine-tune itself makes 0.2500).",
    )
    assert not found.passed


def test_what_rounding_may_move_grows_with_what_the_fine_tune_does() -> None:
    strong = prompt(kl=0.5).model_copy(update={"effect_kl": 6.0})

    assert certificate(strong).passed
    assert not certificate(strong.model_copy(update={"effect_kl": 4.0})).passed


def test_a_change_too_small_for_16_bits_only_informs() -> None:
    assert certificate().model_copy(update={"delta_held": {"a": 0.6}}).passed


def test_many_lost_tensors_are_counted_rather_than_listed() -> None:
    found = certificate(kept={f"{i}": 1.0 for i in range(8)}, changed={"0"})

    assert found.failures == ("Not changed, though targeted: 1, 2, 3, 4, 5 and 2 more.",)


def test_means_are_taken_over_tokens_and_the_worst_logit_over_prompts() -> None:
    found = certificate(prompt(kl=0.0, tokens=300), prompt(kl=0.2, tokens=100, agreement=0.6))

    assert found.mean_kl == pytest.approx(0.05)
    assert found.effect_kl == pytest.approx(0.25)
    assert found.top1_agreement == pytest.approx(0.9)
    assert found.max_logit_difference == 0.2


@pytest.mark.parametrize(
    "name", ["mean_kl", "effect_kl", "max_logit_difference", "logit_spread", "top1_agreement"]
)
def test_a_measurement_that_is_no_number_never_passes(name: str) -> None:
    with pytest.raises(ValidationError):
        PromptCheck.model_validate({**prompt().model_dump(), name: float("nan")})


def test_a_share_that_is_no_number_never_passes() -> None:
    with pytest.raises(ValidationError):
        certificate(kept={"a": float("nan")})


def test_a_certificate_without_a_prompt_is_none() -> None:
    with pytest.raises(ValidationError):
        Certificate.model_validate({**certificate().model_dump(), "prompts": ()})
