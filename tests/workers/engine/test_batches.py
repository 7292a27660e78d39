"""Tokens, labels and micro-batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio.domain.chat_template import renderings
from studio.domain.conversation import Conversation
from studio.errors import EngineError
from studio.tokens.examples import Example
from tests.workers.engine.conftest import MakeExamples
from workers.engine.batches import IGNORED, collate, count_supervised
from workers.engine.model import load_tokenizer

TEMPLATE_FAMILIES = ("qwen3.5", "qwen3-next")


def reply_texts(tokenizer: Any, conversation: Conversation) -> list[str]:
    """What the model must write for each reply, by transformers alone."""
    messages, tools = conversation.template_messages(), list(conversation.tools) or None
    texts = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            thinks = bool(message.get("reasoning_content"))
            prompt = tokenizer.apply_chat_template(
                messages[:index],
                tools=tools,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=thinks,
            )
            whole = tokenizer.apply_chat_template(
                messages[: index + 1], tools=tools, tokenize=False
            )
            assert whole.startswith(prompt)
            texts.append(whole.removeprefix(prompt).removesuffix("\n"))
    return texts


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_tokens_are_those_of_apply_chat_template(
    family: str,
    bases: dict[str, Path],
    conversations: list[Conversation],
    make_examples: MakeExamples,
) -> None:
    tokenizer: Any = load_tokenizer(bases[family])
    examples = make_examples(conversations, family)
    last = {example.line: example for example in examples}
    for line, conversation in enumerate(conversations):
        expected = tokenizer.apply_chat_template(
            conversation.template_messages(),
            tools=list(conversation.tools) or None,
            return_dict=True,
        )
        assert last[line].tokens.tolist() == expected["input_ids"]


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_supervised_text_is_exactly_what_the_assistant_writes(
    family: str,
    bases: dict[str, Path],
    conversations: list[Conversation],
    make_examples: MakeExamples,
) -> None:
    tokenizer: Any = load_tokenizer(bases[family])
    supervised = [""] * len(conversations)
    for example in make_examples(conversations, family):
        supervised[example.line] += tokenizer.decode(example.tokens[example.mask].tolist())
    for text, conversation in zip(supervised, conversations, strict=True):
        assert text == "".join(reply_texts(tokenizer, conversation))
        assert text.endswith("<|im_end|>")


def test_history_is_rendered_as_at_inference(
    bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    tokenizer: Any = load_tokenizer(bases["qwen3.5"])
    talks = [c for c in conversations if sum(m.role == "user" for m in c.messages) > 1]
    for conversation in talks:
        assert len(list(renderings(str(tokenizer.chat_template), conversation))) > 1


def test_long_examples_stop_the_run_and_the_longest_is_named(
    conversations: list[Conversation], make_examples: MakeExamples
) -> None:
    examples = list(make_examples(conversations))
    longest = max(examples, key=lambda example: len(example.tokens))
    with pytest.raises(EngineError) as caught:
        make_examples(conversations, max_length_tokens=100)
    num_long = sum(len(example.tokens) > 100 for example in examples)
    assert caught.value.message == (
        f"{num_long} of {len(examples)} examples are longer than 100 tokens; the longest is line "
        f"{longest.line + 1} of the dataset with {len(longest.tokens)} tokens."
    )
    assert caught.value.field == "data.max_length_tokens"


def test_an_empty_dataset_is_refused(make_examples: MakeExamples) -> None:
    with pytest.raises(EngineError, match="no examples"):
        make_examples([])


def example(tokens: list[int], supervised: list[int]) -> Example:
    mask = np.array([bool(flag) for flag in supervised])
    # As the cache gives them: views of a file that cannot be written.
    ids = np.array(tokens, dtype=np.uint32)
    for array in (mask, ids):
        array.flags.writeable = False
    return Example(line=0, tokens=ids, mask=mask, turns=np.zeros(1, dtype=np.uint32))


def test_micro_batches_are_padded_on_the_right_to_their_own_longest() -> None:
    examples = [example([5, 6, 7], [0, 1, 1]), example([8], [0]), example([9, 9], [0, 1])]
    assert count_supervised(examples) == 3
    first, second = (collate(part, 0, packed=False) for part in (examples[:2], examples[2:]))
    assert first.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert first.mask is not None
    assert first.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert first.inputs().keys() == {"input_ids", "attention_mask"}
    assert (first.num_examples, second.num_examples) == (2, 1)
    assert first.labels.tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]
    assert second.to(torch.device("cpu")).tokens.tolist() == [[9, 9]]


def test_packed_documents_are_told_in_every_way_that_a_model_reads() -> None:
    examples = [example([5, 6, 7], [1, 1, 0]), example([8], [1]), example([9, 4], [1, 1])]
    batch = collate(examples, 0, packed=True).to(torch.device("cpu"))
    assert batch.num_examples == 3
    inputs = batch.inputs()
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert inputs["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert inputs[name].tolist() == [0, 3, 4, 6]
        assert inputs[name].dtype == torch.int32
    assert (inputs["max_length_q"], inputs["max_length_k"]) == (3, 3)
    assert "attention_mask" not in inputs


def test_no_document_is_predicted_from_the_one_before_it() -> None:
    examples = [example([5, 6, 7], [1, 1, 0]), example([8], [1]), example([9, 4], [1, 1])]
    batch = collate(examples, 0, packed=True)
    assert batch.labels.tolist() == [[IGNORED, 6, IGNORED, IGNORED, IGNORED, 4]]
    targets = int((batch.labels[:, 1:] != IGNORED).sum())
    assert targets == count_supervised(examples) == 2
    padded = collate(examples, 0, packed=False)
    assert int((padded.labels[:, 1:] != IGNORED).sum()) == targets
