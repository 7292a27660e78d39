"""Each proof passes on what is right and fails on what was broken on purpose."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from studio.domain.conversation import Conversation
from studio.domain.lora_spec import LoraSpec
from studio.domain.reading import Reading
from studio.domain.targets import TargetGroup
from tests.workers.engine.conftest import FAMILIES, MakeExamples, all_groups
from workers.engine.coverage import prove_coverage
from workers.engine.lora import add_adapter, lora_layers
from workers.engine.lora_proofs import prove_learned, prove_targets
from workers.engine.model import load_base, load_tokenizer
from workers.engine.proofs import prove_loss, prove_mask

ATTENTION_ONLY = (TargetGroup.ATTENTION,)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_counts_what_was_selected(family: str, bases: dict[str, Path]) -> None:
    lora = LoraSpec(rank=8, targets=all_groups(family))
    model = add_adapter(load_base(bases[family], method="qlora"), lora)
    proof = prove_targets(model, lora)
    assert proof.passed is True
    assert proof.details["trainable_parameters"] == model.num_parameters(only_trainable=True)
    groups = proof.details["groups"]
    assert list(groups) == [group.value for group in all_groups(family)]
    assert sum(g["parameters"] for g in groups.values()) == proof.details["trainable_parameters"]


def test_targets_fails_when_the_selection_is_not_what_was_wrapped(bases: dict[str, Path]) -> None:
    wrapped = LoraSpec(rank=8, targets=(TargetGroup.ATTENTION, TargetGroup.DENSE_MLP))
    model = add_adapter(load_base(bases["qwen3.5"], method="lora"), wrapped)
    more = wrapped.model_copy(update={"targets": (*wrapped.targets, TargetGroup.DELTA_NET)})
    less = wrapped.model_copy(update={"targets": ATTENTION_ONLY})
    wider = wrapped.model_copy(update={"rank": 16})
    assert prove_targets(model, wrapped).passed is True
    assert len(prove_targets(model, more).details["missing"]) == 9
    assert len(prove_targets(model, less).details["unexpected"]) == 12
    for broken in (more, less, wider):
        assert prove_targets(model, broken).passed is False


def test_targets_fails_when_a_layer_is_frozen_or_something_else_trains(
    bases: dict[str, Path],
) -> None:
    lora = LoraSpec(rank=8, targets=ATTENTION_ONLY)
    model = add_adapter(load_base(bases["qwen3.5"], method="lora"), lora)
    layer = next(iter(lora_layers(model).values()))
    layer.lora_A.requires_grad_(False)
    assert prove_targets(model, lora).passed is False
    layer.lora_A.requires_grad_(True)
    assert prove_targets(model, lora).passed is True
    embeddings: Any = model.get_input_embeddings()
    embeddings.weight.requires_grad_(True)
    assert prove_targets(model, lora).passed is False


def test_coverage_of_a_dense_model_passes_and_counts_every_weight(bases: dict[str, Path]) -> None:
    fine = load_base(bases["qwen3.5"], method="lora")
    proof = prove_coverage(load_base(bases["qwen3.5"], method="qlora"), "qlora")
    assert proof.passed is True
    total = proof.details["total"]
    assert total["parameters"] == sum(p.numel() for p in fine.parameters())
    assert proof.details["share_4bit"] > 0.6
    # NF4 with double quantisation: 4 bits a weight, 8 bits a block of 64, 32 bits every 256 blocks.
    assert total["bytes_4bit"] / total["parameters_4bit"] == pytest.approx(0.516, abs=0.02)


@pytest.mark.parametrize("family", ["qwen3.5-moe", "qwen3-next"])
def test_coverage_says_that_routed_experts_stay_sixteen_bit(
    family: str, bases: dict[str, Path]
) -> None:
    proof = prove_coverage(load_base(bases[family], method="qlora"), "qlora")
    assert proof.passed is False
    assert "routed experts hold" in proof.summary
    assert proof.details["share_experts_16bit"] > 0.5


def test_coverage_fails_when_nothing_was_quantised(bases: dict[str, Path]) -> None:
    base = load_base(bases["qwen3.5"], method="lora")
    assert prove_coverage(base, "lora").passed is None
    proof = prove_coverage(base, "qlora")
    assert proof.passed is False
    assert "linear layers stay in 16 bits" in proof.summary


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


def test_learned_names_the_group_that_did_not_move(bases: dict[str, Path]) -> None:
    lora = LoraSpec(rank=8, alpha=16, targets=(TargetGroup.ATTENTION, TargetGroup.DENSE_MLP))
    model = add_adapter(load_base(bases["qwen3.5"], method="lora"), lora)
    assert prove_learned(model, lora).passed is False
    square = 0.0
    layer: Any
    for name, layer in lora_layers(model).items():
        if "self_attn" in name:
            nn.init.normal_(layer.lora_B["default"].weight)
            update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            square += float((2 * update).detach().norm() ** 2)
    half = prove_learned(model, lora)
    assert half.passed is False
    assert half.summary.startswith("dense_mlp did not move")
    assert half.details["norms"]["attention"] == pytest.approx(square**0.5, rel=1e-4)
    assert prove_learned(model, lora.model_copy(update={"targets": ATTENTION_ONLY})).passed is True
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(torch.nan)
    assert prove_learned(model, lora).passed is False


def test_loss_compares_first_and_last_tenth() -> None:
    falling = [10.0 - step / 10 for step in range(50)]
    assert prove_loss(falling).passed is True
    assert prove_loss(falling[::-1]).passed is False
    assert prove_loss(falling).details["first_tenth"] == pytest.approx(9.8)
    assert prove_loss([3.0, 1.0]).passed is None
    unseen = prove_loss(falling, [9.0, 8.0, 8.5])
    assert unseen.summary.endswith("On what it was not trained on it went from 9.000 to 8.500.")
    assert unseen.passed is True
