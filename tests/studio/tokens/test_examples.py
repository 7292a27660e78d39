"""Examples: the tokens that transformers gives, the mask that the policy says, cuts by whole turns."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from studio.disk import TEMPLATES
from studio.domain.conversation import Conversation, Message, PlainText, Preference
from studio.domain.preset import load_models
from studio.domain.reading import Reading, Truncation
from studio.errors import InputError
from studio.tokens.examples import Example, ExampleMaker
from studio.tokens.spans import parts
from studio.tokens.tiny import write_tokenizer
from studio.tokens.tokenizer import ModelTokenizer, load
from studio.tokens.truncate import truncate
from tests.conversations import (
    CONVERSATIONS,
    EXAMPLES,
    NAMES,
    ODD_TEXTS,
    SOURCES,
    replies_to_itself,
)

HYBRID, INSTRUCT, THINKING = NAMES
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder for each template, with one tokenizer."""
    known = load_models(TEMPLATES / "models")["tiny/qwen3.5"]
    folders = {}
    for name in NAMES:
        folders[name] = tmp_path_factory.mktemp(name)
        write_tokenizer(known, folders[name])
        (folders[name] / "chat_template.jinja").write_text(SOURCES[name], encoding="utf-8")
    return folders


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path], verdicts: Path) -> dict[str, ModelTokenizer]:
    return {name: load(folder, verdicts) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, Any]:
    """The same tokenizers as transformers reads them."""
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


def answered(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the messages up to the last reply, as templates read them."""
    messages = conversation.template_messages()
    return messages[: 1 + max(i for i, m in enumerate(messages) if m["role"] == "assistant")]


# ---- the tokens of transformers -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(conversation=CONVERSATIONS)
def test_tokens_are_those_of_apply_chat_template(
    tokenizers: dict[str, ModelTokenizer],
    theirs: dict[str, Any],
    name: str,
    conversation: Conversation,
) -> None:
    assume(name != THINKING or not replies_to_itself(conversation))
    *_, last = ExampleMaker(tokenizers[name]).make(conversation, 7)
    expected = theirs[name].apply_chat_template(
        answered(conversation), tools=list(conversation.tools) or None, return_dict=True
    )

    assert last.tokens.tolist() == expected["input_ids"]
    assert last.line == 7
    assert len(last.mask) == len(last.tokens)


TOOL = '\n    {%- elif message.role == "tool"'


def marked(name: str) -> str:
    """Return a template with transformers' marks around what a reply that is generated writes.

    Written by hand from the definition: after the generation prompt, up to the end of the turn.
    """
    source = SOURCES[name]
    header = "{{- '<|im_start|>' + message.role + '\\n"
    if name == INSTRUCT:
        before = header + "' + content }}\n        {%- if message.tool_calls"
        assert source.count(before) == 1
        source = source.replace(
            before,
            header + "' }}{%- generation %}{{- content }}\n        {%- if message.tool_calls",
        )
        close = "{{- '<|im_end|>\\n' }}" + TOOL
        assert source.count(close) == 1
        mark = "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}" + TOOL
        return source.replace(close, mark)
    # Thinking: the reply is cut in two texts, so that the mark can stand between them.
    trim = "|trim" if name == HYBRID else ".strip('\\n')"
    content = "content" if name == HYBRID else "content.lstrip('\\n')"
    start = source.index("        {%- if loop.index0 > ns.last_query_index %}")
    calls = source.index("        {%- if message.tool_calls", start)
    end = source.index(
        "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\"", calls
    )
    after = end + len("        {{- '<|im_end|>\\n' }}\n")
    writes = "loop.index0 > ns.last_query_index"
    if name == THINKING:
        writes += " and (loop.last or reasoning_content)"
    return (
        source[:start]
        + "{%- set tail %}"
        + source[calls:end]
        + "{%- endset %}{%- set thought = reasoning_content" + trim + " %}"
        + "{%- if " + writes + " %}"
        + header + "<think>\\n' + ('' if thought|trim else thought + '\\n</think>\\n\\n') }}"
        + "{%- generation %}{{- (thought + '\\n</think>\\n\\n' if thought|trim else '') + "
        + content + " + tail + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
        + "{%- else %}" + header + "' + content + tail + '<|im_end|>\\n' }}{%- endif %}\n"
        + source[after:]
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(conversation=CONVERSATIONS)
def test_the_mask_is_that_of_transformers_generation_marks(
    tokenizers: dict[str, ModelTokenizer],
    theirs: dict[str, Any],
    name: str,
    conversation: Conversation,
) -> None:
    assume(name != THINKING or not replies_to_itself(conversation))
    *_, last = ExampleMaker(tokenizers[name]).make(conversation, 0)
    expected = theirs[name].apply_chat_template(
        answered(conversation),
        tools=list(conversation.tools) or None,
        chat_template=marked(name),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert last.tokens.tolist() == expected["input_ids"]
    wanted = np.array(expected["assistant_masks"], dtype=bool)
    if name == THINKING:
        # Steps that think stand in the last text as well; an earlier one may have taught them.
        assert not (last.mask & ~wanted).any()
        assert last.mask[-10:].tolist() == wanted[-10:].tolist()
    else:
        starts = transformers_starts(theirs[name], conversation, wanted)
        assert last.mask.tolist() == starts


def transformers_starts(tokenizer: Any, conversation: Conversation, mask: np.ndarray) -> list[bool]:
    """Return the mask of transformers without tokens that begin before the generation.

    transformers takes the token at the first generated character, even where the header began it.
    """
    text = tokenizer.apply_chat_template(
        answered(conversation), tools=list(conversation.tools) or None, tokenize=False
    )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found = mask.copy()
    for index in np.flatnonzero(mask):
        start, end = encoded["offset_mapping"][index]
        begins = index == 0 or not mask[index - 1]
        if begins and "\n" in text[start:end] and text[start - 9 : start] == "assistant":
            found[index] = False
    return [bool(value) for value in found]


# ---- the mask -----------------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", ["train", "mask", "strip"])
@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(conversation=CONVERSATIONS)
def test_headers_and_other_roles_are_never_supervised(
    tokenizers: dict[str, ModelTokenizer], name: str, thinking: Any, conversation: Conversation
) -> None:
    assume(name != THINKING or not replies_to_itself(conversation, thinks=thinking != "strip"))
    maker = ExampleMaker(tokenizers[name], Reading(thinking=thinking))
    rendered = maker.renderings(conversation)
    for rendering in rendered:
        example = maker.example(rendering, 0)
        _, starts = maker.tokenizer.encode(rendering.text)
        kinds = np.empty(len(rendering.text), dtype=object)
        for span in parts(rendering.text):
            kinds[span.start : span.end] = span.kind
        supervised = starts[example.mask].tolist()
        for start in supervised:
            kind = kinds[start]
            at_end = rendering.text.startswith("<|im_end|>", start)
            assert kind in ("think", "answer", "tool_call") or (kind == "header" and at_end)
            if thinking != "train":
                assert kind != "think"
        ends = [start for start in supervised if rendering.text.startswith("<|im_end|>", start)]
        assert len(ends) == len(rendering.spans)


def test_two_readings_of_the_same_record_are_the_same_example(
    tokenizers: dict[str, ModelTokenizer],
) -> None:
    for name in NAMES:
        maker = ExampleMaker(tokenizers[name])
        first = [maker.make(conversation, 0) for conversation in EXAMPLES]
        again = [ExampleMaker(tokenizers[name]).make(c, 0) for c in EXAMPLES]
        for one, other in zip(first, again, strict=True):
            assert [e.tokens.tolist() for e in one] == [e.tokens.tolist() for e in other]
            assert [e.mask.tolist() for e in one] == [e.mask.tolist() for e in other]
            assert [e.turns.tolist() for e in one] == [e.turns.tolist() for e in other]


def test_turns_begin_with_the_token_that_opens_them(
    tokenizers: dict[str, ModelTokenizer],
) -> None:
    maker = ExampleMaker(tokenizers[INSTRUCT])
    opens = maker.tokenizer.token_id("<|im_start|>")
    for conversation in EXAMPLES:
        (example,) = maker.make(conversation, 0)
        asked = sum(message.role == "user" for message in conversation.messages)
        assert len(example.turns) == asked
        assert set(example.tokens[example.turns].tolist()) == {opens}


def test_thinking_that_is_not_written_is_counted_in_its_example(
    tokenizers: dict[str, ModelTokenizer],
) -> None:
    thinks = Message(role="assistant", content="So.", reasoning_content="Hm.")
    conversation = Conversation(messages=(Message(role="user", content="Why?"), thinks))

    (unwritten,) = ExampleMaker(tokenizers[INSTRUCT]).make(conversation, 0)
    (written,) = ExampleMaker(tokenizers[HYBRID]).make(conversation, 0)

    assert (unwritten.unwritten, written.unwritten) == (1, 0)


# ---- other records ------------------------------------------------------------------------------


def test_a_text_is_learned_as_a_whole_with_its_end(
    tokenizers: dict[str, ModelTokenizer],
) -> None:
    tokenizer = tokenizers[HYBRID]
    (example,) = ExampleMaker(tokenizer).make(PlainText(text="The tide turns."), 3)
    tokens, _ = tokenizer.encode("The tide turns.")

    assert example.tokens.tolist() == [*tokens.tolist(), tokenizer.end_of_text]
    assert example.mask.all()
    assert example.is_text
    assert example.line == 3


def test_a_template_that_leaves_tools_out_is_refused(
    folders: dict[str, Path], verdicts: Path
) -> None:
    folder = folders[INSTRUCT].with_name("no-tools")
    shutil.copytree(folders[INSTRUCT], folder)
    # The same template, but it never sees the tools that the conversation offers.
    source = "{%- set tools = none %}" + SOURCES[INSTRUCT]
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    record = next(each for each in EXAMPLES if each.tools)
    name = record.tools[0]["function"]["name"]

    with pytest.raises(InputError, match=f"does not write the tool '{name}'"):
        ExampleMaker(load(folder, verdicts)).make(record, 0)
    assert ExampleMaker(load(folder, verdicts)).make(EXAMPLES[0], 0)
    assert ExampleMaker(load(folders[INSTRUCT], verdicts)).make(record, 0)


def test_a_preference_is_refused(tokenizers: dict[str, ModelTokenizer]) -> None:
    reply = (Message(role="assistant", content="A"),)
    record = Preference(messages=(), chosen=reply, rejected=reply)

    with pytest.raises(InputError, match="a better and a worse reply"):
        ExampleMaker(tokenizers[HYBRID]).make(record, 0)


# ---- truncation ---------------------------------------------------------------------------------


def exchanges(
    conversation: Conversation, replies: int
) -> tuple[list[Message], list[list[Message]]]:
    """Return what stands before the first question, and the exchanges up to the n-th reply."""
    head: list[Message] = []
    found: list[list[Message]] = []
    for message in conversation.messages:
        if message.role == "user" and (not found or found[-1][-1].role == "assistant"):
            found.append([])
        (found[-1] if found else head).append(message)
        replies -= message.role == "assistant"
        if replies == 0:
            break
    return head, found


def count(tokens: np.ndarray, tokenizer: ModelTokenizer) -> int:
    """Return how many replies stand in a text of ChatML."""
    text = "".join(tokenizer.decode_token(token) for token in tokens)
    return text.count("<|im_start|>assistant\n")


@pytest.mark.parametrize("policy", ["cut", "split"])
@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(conversation=CONVERSATIONS, share=st.floats(0, 1.1))
def test_a_cut_example_is_the_conversation_without_the_turns_that_are_cut(
    tokenizers: dict[str, ModelTokenizer],
    name: str,
    policy: Any,
    conversation: Conversation,
    share: float,
) -> None:
    assume(name != THINKING or not replies_to_itself(conversation))
    maker = ExampleMaker(tokenizers[name])
    for whole in maker.make(conversation, 0):
        limit = max(16, int(len(whole.tokens) * share))
        found = truncate(whole, Truncation(max_length_tokens=limit, policy=policy))
        check_counts(whole, found)
        head, turns = exchanges(conversation, count(whole.tokens, maker.tokenizer))
        assert len(whole.turns) == len(turns)
        anew = {
            tuple(rendered.tokens.tolist())
            for kept in runs(turns, policy)
            for rendered in maker.make(
                Conversation(messages=(*head, *kept), tools=conversation.tools), 0
            )[-1:]
        }
        for example in found.examples:
            assert len(example.tokens) <= limit
            assert tuple(example.tokens.tolist()) in anew
            opens = maker.tokenizer.token_id("<|im_start|>")
            assert (example.tokens[example.turns] == opens).all()


def runs(turns: list[list[Message]], policy: str) -> Iterator[list[Message]]:
    """Yield the messages of all runs of exchanges; of `cut`, of those that reach the end."""
    for start in range(len(turns)):
        for end in range(start + 1, len(turns) + 1):
            if policy == "split" or end == len(turns):
                yield [message for turn in turns[start:end] for message in turn]


def check_counts(whole: Example, found: Any) -> None:
    supervised = sum(int(example.mask.sum()) for example in found.examples)
    assert supervised + found.lost_supervised == whole.mask.sum()
    assert found.lost_tokens == len(whole.tokens) - found.kept.sum()
    assert found.lost_supervised == (whole.mask & ~found.kept).sum()
    assert all(example.mask[1:].any() for example in found.examples)


def example(turns: list[int], size: int, supervised: list[int]) -> Example:
    mask = np.zeros(size, dtype=np.bool_)
    mask[supervised] = True
    tokens = np.arange(size, dtype=np.uint32)
    return Example(line=0, tokens=tokens, mask=mask, turns=np.array(turns, dtype=np.uint32))


def kept(found: Any) -> list[list[int]]:
    return [piece.tokens.tolist() for piece in found.examples]


# System message 0..9; turns of 10, 20, 5 and 5 tokens, of which the last is learned.
FOUR = example([10, 20, 40, 45], 50, [19, 39, 44, 49])


@pytest.mark.parametrize(
    ("policy", "limit", "expected"),
    [
        ("refuse", 50, [range(50)]),
        ("refuse", 49, []),
        ("cut", 50, [range(50)]),
        ("cut", 49, [[*range(10), *range(20, 50)]]),
        ("cut", 20, [[*range(10), *range(40, 50)]]),
        ("cut", 16, [[*range(10), *range(45, 50)]]),
        ("split", 40, [[*range(40)], [*range(10), *range(40, 50)]]),
        ("split", 35, [[*range(20)], [*range(10), *range(20, 45)], [*range(10), *range(45, 50)]]),
        # The turn of 20 tokens is too long by itself.
        ("split", 25, [[*range(20)], [*range(10), *range(40, 50)]]),
        ("split", 16, [[*range(10), *range(40, 45)], [*range(10), *range(45, 50)]]),
    ],
)
def test_whole_turns_are_kept_with_the_system_message(
    policy: Any, limit: int, expected: list[list[int]]
) -> None:
    found = truncate(FOUR, Truncation(max_length_tokens=limit, policy=policy))

    assert kept(found) == [list(tokens) for tokens in expected]
    check_counts(FOUR, found)


def test_a_greeting_before_the_first_question_is_learned_once() -> None:
    greeted = example([10, 20, 30], 40, [5, 19, 29, 39])

    found = truncate(greeted, Truncation(max_length_tokens=20, policy="split"))

    assert [piece.mask.nonzero()[0].tolist() for piece in found.examples] == [[5, 19], [19], [19]]
    check_counts(greeted, found)


def test_parts_of_which_nothing_is_learned_are_dropped_and_counted() -> None:
    last = example([10, 20, 30], 40, [39])

    found = truncate(last, Truncation(max_length_tokens=20, policy="split"))

    assert kept(found) == [[*range(10), *range(30, 40)]]
    assert (found.lost_tokens, found.lost_supervised) == (20, 0)


def test_a_turn_that_is_too_long_is_lost_and_counted() -> None:
    found = truncate(FOUR, Truncation(max_length_tokens=16, policy="split"))

    assert (found.lost_tokens, found.lost_supervised) == (30, 2)
    assert not found.kept[10:40].any()


def test_a_long_text_is_cut_into_windows_or_at_its_end() -> None:
    text = example([], 50, list(range(50)))

    split = truncate(text, Truncation(max_length_tokens=20, policy="split"))
    cut = truncate(text, Truncation(max_length_tokens=20, policy="cut"))

    assert kept(split) == [[*range(20)], [*range(20, 40)], [*range(40, 50)]]
    assert kept(cut) == [[*range(20)]]
    assert cut.lost_supervised == 30


def test_without_a_limit_nothing_is_cut() -> None:
    found = truncate(FOUR, Truncation())

    assert kept(found) == [FOUR.tokens.tolist()]
    assert found.lost_tokens == 0


# ---- parts --------------------------------------------------------------------------------------


@given(text=ODD_TEXTS)
def test_parts_cover_any_text(text: str) -> None:
    found = parts(text)

    assert "".join(text[span.start : span.end] for span in found) == text
    assert [span.end for span in found[:-1]] == [span.start for span in found[1:]]


def test_parts_have_the_kinds_of_a_conversation() -> None:
    text = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nT\n</think>\n\nA\n\n<tool_call>\nx\n</tool_call>\n<tool_call>\ny\n</tool_call>"
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nr\n</tool_response>\n<tool_response>\nq\n"
        "</tool_response><|im_end|>\n"
    )
    found = [(span.kind, text[span.start : span.end]) for span in parts(text)]

    assert [entry for entry in found if entry[0] != "header"] == [
        ("system", "S"),
        ("user", "Q"),
        ("think", "<think>\nT\n</think>\n\n"),
        ("answer", "A\n\n"),
        ("tool_call", "<tool_call>\nx\n</tool_call>\n"),
        ("tool_call", "<tool_call>\ny\n</tool_call>"),
        ("tool_result", "<tool_response>\nr\n</tool_response>\n"),
        ("tool_result", "<tool_response>\nq\n</tool_response>"),
    ]
    assert found[0] == ("header", "<|im_start|>system\n")


def test_a_text_that_is_not_chatml_is_one_part() -> None:
    assert [span.kind for span in parts("Hello.")] == ["text"]
