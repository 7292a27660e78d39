"""Tokens, labels, order and micro-batches."""

import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.domain.chat_template import renderings
from studio.domain.conversation import Conversation
from studio.domain.spec import BatchSpec, TrainSpec
from studio.errors import EngineError
from workers.engine.batches import (
    IGNORED,
    WINDOW_STEPS,
    Example,
    count_steps,
    micro_batches,
    read_examples,
    step_order,
)
from workers.engine.model import load_tokenizer

TEMPLATE_FAMILIES = ("qwen3.5", "qwen3-next")
LENGTHS = [17 * index % 101 + 3 for index in range(50)]


def write(path: Path, conversations: list[Conversation]) -> Path:
    path.write_text("".join(c.to_json() + "\n" for c in conversations), encoding="utf-8")
    return path


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
    family: str, bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    tokenizer: Any = load_tokenizer(bases[family])
    dataset = write(tmp_path / "d.jsonl", conversations)
    examples = read_examples(dataset, tokenizer, max_length_tokens=2000)
    last = {example.line: example for example in examples}
    for line, conversation in enumerate(conversations, start=1):
        expected = tokenizer.apply_chat_template(
            conversation.template_messages(),
            tools=list(conversation.tools) or None,
            return_dict=True,
        )
        assert list(last[line].tokens) == expected["input_ids"]


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_supervised_text_is_exactly_what_the_assistant_writes(
    family: str, bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    tokenizer: Any = load_tokenizer(bases[family])
    for conversation in conversations:
        dataset = write(tmp_path / "d.jsonl", [conversation])
        examples = read_examples(dataset, tokenizer, max_length_tokens=2000)
        supervised = "".join(
            tokenizer.decode([label for label in example.labels if label != IGNORED])
            for example in examples
        )
        assert supervised == "".join(reply_texts(tokenizer, conversation))
        assert supervised.endswith("<|im_end|>")


def test_labels_are_the_tokens_themselves(bases: dict[str, Path], dataset: Path) -> None:
    tokenizer: Any = load_tokenizer(bases["qwen3.5"])
    for example in read_examples(dataset, tokenizer, max_length_tokens=2000):
        assert len(example.labels) == len(example.tokens)
        assert all(
            label in (IGNORED, token)
            for label, token in zip(example.labels, example.tokens, strict=True)
        )
        assert 0 < example.num_supervised < len(example.tokens)


def test_history_is_rendered_as_at_inference(
    bases: dict[str, Path], conversations: list[Conversation]
) -> None:
    tokenizer: Any = load_tokenizer(bases["qwen3.5"])
    talks = [c for c in conversations if sum(m.role == "user" for m in c.messages) > 1]
    for conversation in talks:
        assert len(list(renderings(str(tokenizer.chat_template), conversation))) > 1


def test_long_examples_stop_the_run_and_the_longest_is_named(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    dataset = write(tmp_path / "d.jsonl", conversations)
    tokenizer: Any = load_tokenizer(bases["qwen3.5"])
    examples = read_examples(dataset, tokenizer, max_length_tokens=2000)
    longest = max(examples, key=lambda example: len(example.tokens))
    with pytest.raises(EngineError) as caught:
        read_examples(dataset, tokenizer, max_length_tokens=100)
    num_long = sum(len(example.tokens) > 100 for example in examples)
    assert caught.value.message == (
        f"{num_long} of {len(examples)} examples are longer than 100 tokens; the longest is line "
        f"{longest.line} of the dataset with {len(longest.tokens)} tokens."
    )
    assert caught.value.field == "data.max_length_tokens"


def test_an_empty_dataset_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    dataset = write(tmp_path / "d.jsonl", [])
    with pytest.raises(EngineError, match="no examples"):
        read_examples(dataset, load_tokenizer(bases["qwen3.5"]), max_length_tokens=100)


# ---- order ------------------------------------------------------------------------------------


def order(batch: BatchSpec, first_step: int = 0, **train: float) -> list[tuple[int, ...]]:
    return list(step_order(LENGTHS, batch, TrainSpec.model_validate(train), first_step))


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_the_split_of_a_step_does_not_change_what_it_holds(micro: int, accumulation: int) -> None:
    batch = BatchSpec(micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    whole = BatchSpec(micro_batch_size=8, gradient_accumulation_steps=1)
    assert order(batch, epochs=3) == order(whole, epochs=3)


def test_the_order_continues_from_any_cursor() -> None:
    batch = BatchSpec(micro_batch_size=2, gradient_accumulation_steps=2)
    whole = order(batch, epochs=3)
    assert len(whole) > 2 * WINDOW_STEPS
    for cursor in range(len(whole) + 1):
        assert order(batch, cursor, epochs=3) == whole[cursor:]


def test_every_epoch_holds_every_example_once() -> None:
    batch = BatchSpec(micro_batch_size=5, gradient_accumulation_steps=2)
    for epochs in (1, 2, 3):
        seen = sorted(chain.from_iterable(order(batch, epochs=epochs)))
        assert seen == sorted(list(range(50)) * epochs)


def test_every_step_is_full_and_the_last_is_filled_from_the_next_epoch() -> None:
    batch = BatchSpec(micro_batch_size=8, gradient_accumulation_steps=2)
    steps = order(batch, epochs=1)
    assert [len(step) for step in steps] == [16] * 4
    assert set(chain.from_iterable(steps)) == set(range(50))


def test_seeds_differ_and_repeat() -> None:
    batch = BatchSpec(micro_batch_size=4)
    assert order(batch, epochs=2, seed=1) == order(batch, epochs=2, seed=1)
    assert order(batch, epochs=2, seed=1) != order(batch, epochs=2, seed=2)


def test_max_steps_cuts_and_changes_nothing_before() -> None:
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=1)
    assert order(batch, epochs=3, max_steps=7) == order(batch, epochs=3)[:7]


def test_sorting_inside_a_window_saves_padding() -> None:
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=1)
    steps = order(batch, epochs=8)
    width = sum(4 * max(LENGTHS[index] for index in step) for step in steps)
    real = sum(LENGTHS[index] for step in steps for index in step)
    assert real / width > 0.85


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [(1, None, 4), (0.5, None, 2), (0.01, None, 1), (3, None, 10), (3, 7, 7), (3, 99, 10)],
)
def test_steps_are_counted(epochs: float, max_steps: int | None, steps: int) -> None:
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=4)
    train = TrainSpec(epochs=epochs, max_steps=max_steps)
    assert count_steps(50, batch, train) == steps
    assert len(list(step_order(LENGTHS, batch, train))) == steps


def test_rounding_adds_no_step() -> None:
    batch = BatchSpec(micro_batch_size=1, gradient_accumulation_steps=3)
    assert math.ceil(30 * 0.1) == 3
    assert count_steps(30, batch, TrainSpec(epochs=0.1)) == 1


def test_micro_batches_are_padded_on_the_right_to_their_own_longest() -> None:
    examples = [
        Example(line=1, tokens=(5, 6, 7), labels=(IGNORED, 6, 7)),
        Example(line=2, tokens=(8,), labels=(IGNORED,)),
        Example(line=3, tokens=(9, 9), labels=(IGNORED, 9)),
    ]
    first, second = micro_batches(examples, 2, pad_token_id=0)
    assert first.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert first.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert first.labels.tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]
    assert second.to(torch.device("cpu")).tokens.tolist() == [[9, 9]]
