"""Each proof passes on what is right and fails on what was broken on purpose."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studio.domain.conversation import Conversation
from studio.domain.reading import Reading
from studio.domain.targets import TargetGroup
from tests.workers.engine.conftest import FAMILIES, MakeExamples
from workers.engine.model import load_tokenizer
from workers.engine.proofs import prove_loss, prove_mask

ATTENTION_ONLY = (TargetGroup.ATTENTION,)


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_shows_what_is_supervised_and_that_the_tokens_are_transformers_own(
    family: str,
    bases: dict[str, Path],
    conversations: list[Conversation],
    make_examples: MakeExamples,
) -> None:
    tokenizer = load_tokenizer(bases[family])
    examples = make_examples(conversations, family)
    proof = prove_mask(examples, tokenizer, Reading())
    assert proof.passed is True
    assert proof.summary.endswith("The tokens are identical to transformers' on 8 conversations.")
    shown = proof.details["shown"]
    assert len(shown) == 3
    for number, entry in enumerate(shown):
        text = "".join(segment["text"] for segment in entry["segments"])
        assert text == tokenizer.decode(examples[number].tokens.tolist())
    assert shown[0]["segments"][1] == {
        "text": "Yes, it is covered. The warranty lasts 31 months.<|im_end|>",
        "supervised": True,
    }


def test_mask_fails_when_nothing_is_supervised(
    bases: dict[str, Path], conversations: list[Conversation], make_examples: MakeExamples
) -> None:
    examples = make_examples(conversations)
    examples.supervised = np.zeros_like(examples.supervised)
    assert prove_mask(examples, load_tokenizer(bases["qwen3.5"]), Reading()).passed is False


@pytest.mark.parametrize("thinking", ["train", "mask", "strip"])
def test_the_tokens_are_transformers_own_whatever_becomes_of_the_thinking(
    thinking: Any,
    bases: dict[str, Path],
    conversations: list[Conversation],
    make_examples: MakeExamples,
) -> None:
    thinkers = [c for c in conversations if any(m.reasoning_content for m in c.messages)]
    examples = make_examples(thinkers, thinking=thinking)
    proof = prove_mask(examples, load_tokenizer(bases["qwen3.5"]), Reading(thinking=thinking))
    assert proof.passed is True
    assert proof.details["compared_with_transformers"] == 8


def test_mask_fails_when_the_tokens_are_not_those_of_transformers(
    bases: dict[str, Path], conversations: list[Conversation], make_examples: MakeExamples
) -> None:
    tokenizer: Any = load_tokenizer(bases["qwen3.5"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|>!")
    examples = make_examples(conversations)
    proof = prove_mask(examples, tokenizer, Reading())
    assert proof.passed is False
    assert "The tokens of 8 of 8 conversations differ from transformers', " in proof.summary
    assert proof.details["different_from_transformers"][0] == 1


def test_loss_compares_first_and_last_tenth() -> None:
    falling = [10.0 - step / 10 for step in range(50)]
    assert prove_loss(falling).passed is True
    assert prove_loss(falling[::-1]).passed is False
    assert prove_loss(falling).details["first_tenth"] == pytest.approx(9.8)
    assert prove_loss([3.0, 1.0]).passed is None
    evaluations = [(0, 9.0), (25, 8.0), (50, 8.5)]
    unseen = prove_loss(falling, evaluations)
    assert unseen.summary.endswith("On what it was not trained on it went from 9.000 to 8.500.")
    assert unseen.passed is True


def test_loss_speaks_of_the_weights_that_were_kept() -> None:
    diverging = [10.0 - step / 10 for step in range(25)] + [50.0] * 25
    evaluations = [(0, 9.0), (25, 8.0), (50, 48.5)]
    kept = prove_loss(diverging, evaluations, kept_step=25)
    assert kept.passed is True
    assert kept.summary.endswith(
        "it went from 9.000 to 8.000. What is kept is step 25, the best evaluation of 50 steps "
        "taken."
    )
    assert prove_loss(diverging, evaluations).passed is False
