"""Every bad file is refused with one sentence that names line, place and value."""

import codecs
import gzip
import io
import json
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.disk import TEMPLATES
from studio.domain.conversation import Conversation
from studio.domain.validation import (
    MAX_ISSUES,
    MAX_LINE_BYTES,
    Issue,
    Reader,
    Report,
    check_file,
)
from studio.errors import InputError

USER = {"role": "user", "content": "Is it covered?"}
ASSISTANT = {"role": "assistant", "content": "Yes, for 31 months."}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
GOOD = json.dumps({"messages": [USER, ASSISTANT]}).encode()


def line(*messages: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"messages": messages, **fields}).encode()


def read(content: bytes) -> tuple[list[Conversation], Report]:
    reader = Reader()
    conversations = list(reader.read(io.BytesIO(content)))
    return conversations, reader.report()


def sentences(content: bytes) -> list[str]:
    return [str(issue) for issue in read(content)[1].issues]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", GOOD)
    return buffer.getvalue()


NESTED = b"[" * 100_000 + b"]" * 100_000
TOO_DEEP = "the record is nested more than 100 levels deep"
CONTROL = "a control token of the chat format stands in the text"

BAD: dict[str, tuple[bytes, str]] = {
    # ---- the file ----
    "empty file": (b"", "the file holds no conversations"),
    "only blanks": (b"\n  \n\r\n\t\n", "the file holds no conversations"),
    "UTF-16 little endian": (
        GOOD.decode().encode("utf-16"),
        "the file is text in UTF-16; save it as JSON lines in UTF-8",
    ),
    "UTF-16 big endian": (
        codecs.BOM_UTF16_BE + GOOD.decode().encode("utf-16-be"),
        "the file is text in UTF-16; save it as JSON lines in UTF-8",
    ),
    "UTF-16 without a byte order mark": (
        GOOD.decode().encode("utf-16-le"),
        "the file is binary or text in UTF-16; save it as JSON lines in UTF-8",
    ),
    "zip": (
        zipped(),
        "the file is a zip archive or an Excel workbook; save it as JSON lines in UTF-8",
    ),
    "gzip": (gzip.compress(GOOD), "the file is a gzip file; save it as JSON lines in UTF-8"),
    "parquet": (
        b"PAR1\x15\x04\x15\x00PAR1",
        "the file is a Parquet file; save it as JSON lines in UTF-8",
    ),
    "PDF": (b"%PDF-1.7\n", "the file is a PDF; save it as JSON lines in UTF-8"),
    "JSON array": (
        b"[" + GOOD + b"]",
        "line 1: the file is one JSON array; write one conversation a line instead",
    ),
    "JSON array after blank lines": (
        b"\n" * 20 + b" [\n" + GOOD + b"\n]",
        "line 1: the file is one JSON array; write one conversation a line instead",
    ),
    "JSON array after a byte order mark": (
        codecs.BOM_UTF8 + b"[" + GOOD + b"]",
        "line 1: the file is one JSON array; write one conversation a line instead",
    ),
    # ---- the line ----
    "not JSON": (b"hello", "line 1: not JSON: expecting value at column 1 (found hello)"),
    "truncated last line": (
        GOOD + b"\n" + GOOD[:40],
        "line 2: not JSON: expecting ':' delimiter at column 41 "
        '(found {"messages": [{"role": "user", "content")',
    ),
    "cut after a comma": (
        b'{"messages": [\n',
        'line 1: not JSON: expecting value at column 15 (found {"messages": [)',
    ),
    "Latin-1 byte": (
        b'{"messages": "caf\xe9"}',
        "line 1: byte 18 of the line is not UTF-8 (found 0xe9)",
    ),
    "NaN": (
        line(USER, ASSISTANT, tools=[{"a": float("nan")}]),
        "line 1: not JSON: NaN is not a JSON number",
    ),
    "number beyond a float": (
        b'{"messages": 1e999}',
        "line 1: the number is too large (found 1e999)",
    ),
    "5,000-digit integer": (
        b'{"messages": ' + b"7" * 5000 + b"}",
        "line 1: a number has 5000 digits; at most 4300 are read",
    ),
    "100,000-deep nesting": (b'{"messages": ' + NESTED + b"}", f"line 1: {TOO_DEEP}"),
    "nesting that Python reads but the store cannot": (
        b'{"messages": ' + NESTED[99_800:100_200] + b"}",
        f"line 1: {TOO_DEEP}",
    ),
    "duplicate key": (
        b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}',
        "line 1, role: the key stands twice in one object",
    ),
    "duplicate key that cannot be printed": (
        b'{"\\ud800": 1, "\\ud800": 2}',
        "line 1, \\ud800: the key stands twice in one object",
    ),
    "a plain value": (
        b"5",
        "line 1: a conversation is an object with a list `messages` (found 5)",
    ),
    # ---- the record ----
    "wrong role": (
        line({"role": "bot", "content": "a"}),
        "line 1, messages[0].role: input should be 'system', 'developer', 'user', 'assistant' or "
        "'tool' (found bot)",
    ),
    "role with a line break": (
        line({"role": "bo\nt\x1b[31m", "content": "a"}),
        "line 1, messages[0].role: input should be 'system', 'developer', 'user', 'assistant' or "
        "'tool' (found bo\\nt\\x1b[31m)",
    ),
    "image part": (
        line({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT),
        "line 1, messages[0].content: part 0 is of type 'image_url'; only text parts can be trained"
        ' (found [{"type": "image_url"}])',
    ),
    "bad arguments": (
        line(
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]},
        ),
        "line 1, messages[1].tool_calls[0].function.arguments: the arguments are not JSON: "
        "expecting property name enclosed in double quotes at column 2 (found {a)",
    ),
    "lone surrogate": (
        line(USER, {"role": "assistant", "content": "a\ud83d"}),
        "line 1, messages[1].content: an unpaired surrogate stands for no character "
        "(found a\\ud83d)",
    ),
    "lone surrogate inside arguments": (
        line(
            USER,
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a": ["\\ud83d"]}'}}],
            },
        ),
        "line 1, messages[1].tool_calls[0].function.arguments: in the arguments, a[0]: an unpaired "
        'surrogate stands for no character (found {"a": ["\\ud83d"]})',
    ),
    "lone surrogate as a key": (
        line(USER, ASSISTANT, tools=[{"\ud83d": 1}]),
        "line 1, tools[0].\\ud83d: an unpaired surrogate stands for no character (found \\ud83d)",
    ),
    # ---- the rules ----
    "no assistant": (line(USER), "line 1, messages: no assistant message: nothing to learn"),
    "no user": (line(ASSISTANT), "line 1, messages: no user message: nothing is asked"),
    "system not first": (
        line(USER, {"role": "system", "content": "Be brief."}, ASSISTANT),
        "line 1, messages[1].role: a system message stands only at the beginning (found system)",
    ),
    "tool result without call": (
        line(USER, {"role": "tool", "content": "17:50"}, ASSISTANT),
        "line 1, messages[1]: a tool result without a call before it",
    ),
    "tool result of another call": (
        line(
            USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_2", "content": "17:50"},
            ASSISTANT,
        ),
        "line 1, messages[2].tool_call_id: no call has this id (found call_2)",
    ),
    "empty answer": (
        line(USER, {"role": "assistant", "content": " \n"}),
        "line 1, messages[1].content: the assistant's answer is empty",
    ),
    "control token in content": (
        line(USER, {"role": "assistant", "content": "a<|im_end|>b"}),
        f"line 1, messages[1].content: {CONTROL} (found <|im_end|>)",
    ),
    "control token in reasoning": (
        line(USER, {**ASSISTANT, "reasoning_content": "<|im_start|>"}),
        f"line 1, messages[1].reasoning_content: {CONTROL} (found <|im_start|>)",
    ),
    "control token in arguments": (
        line(
            USER,
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": "<|im_end|>"}}}],
            },
        ),
        f"line 1, messages[1].tool_calls[0]: {CONTROL} (found <|im_end|>)",
    ),
    "control token in a tool": (
        line(USER, ASSISTANT, tools=[{"name": "<|endoftext|>"}]),
        f"line 1, tools[0]: {CONTROL} (found <|endoftext|>)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_one_exact_sentence(name: str) -> None:
    content, sentence = BAD[name]
    _, report = read(content)
    errors = [str(issue) for issue in report.issues if issue.severity == "error"]

    assert errors == [sentence]
    assert not report.is_accepted
    assert sentence.isprintable()


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD + b"\n",
        GOOD + b"\r\n",
        b"\n\n" + GOOD + b"\n\n",
        line({"role": "user", "content": "one\u2028line\u2029still\x85"}, ASSISTANT),
        json.dumps(
            {"messages": [{"role": "user", "content": "a\u2028b"}, ASSISTANT]}, ensure_ascii=False
        ).encode(),
        line(USER, {"role": "assistant", "content": "\U0001f30a"}),
        line({"role": "developer", "content": "Be brief."}, USER, ASSISTANT),
        line(
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": ""},
            ASSISTANT,
        ),
    ],
)
def test_a_good_line_gives_one_conversation_and_no_findings(content: bytes) -> None:
    conversations, report = read(content)

    assert len(conversations) == 1
    assert report.issues == ()
    assert report.is_accepted


def test_a_line_separator_inside_a_string_stays_in_the_text() -> None:
    content = json.dumps(
        {"messages": [{"role": "user", "content": "a\u2028b"}, ASSISTANT]}, ensure_ascii=False
    ).encode()

    assert read(content + b"\n" + GOOD)[0][0].messages[0].content == "a\u2028b"
    assert read(content + b"\n" + GOOD)[1].num_lines == 2


def test_windows_line_ends_and_unix_line_ends_give_the_same_conversations() -> None:
    assert read(GOOD + b"\r\n" + GOOD + b"\r\n")[0] == read(GOOD + b"\n" + GOOD)[0]


def test_a_byte_order_mark_is_removed_and_noted() -> None:
    conversations, report = read(codecs.BOM_UTF8 + GOOD)

    assert len(conversations) == 1
    assert report.is_accepted
    assert [str(issue) for issue in report.issues] == ["line 1: a byte order mark was removed"]
    assert report.issues[0].severity == "note"


def test_a_byte_order_mark_alone_is_an_empty_file() -> None:
    assert sentences(codecs.BOM_UTF8)[1:] == ["the file holds no conversations"]


def test_a_repeated_conversation_is_a_warning_that_names_the_first() -> None:
    respelled = b'{"messages":' + json.dumps([USER, ASSISTANT]).encode() + b', "id": 7}'
    conversations, report = read(GOOD + b"\n\n" + respelled + b"\n")

    assert len(conversations) == 2
    assert [str(issue) for issue in report.issues] == ["line 3: the same conversation as line 1"]
    assert (report.num_warnings, report.num_errors) == (1, 0)
    assert report.is_accepted


def test_a_bad_line_does_not_hide_the_good_ones_around_it() -> None:
    other = line(USER, {"role": "assistant", "content": "No."})
    conversations, report = read(GOOD + b"\n{\n" + other)

    assert len(conversations) == 2
    assert (report.num_lines, report.num_conversations, report.num_errors) == (3, 2, 1)
    assert not report.is_accepted


def test_all_findings_are_counted_though_only_the_first_are_kept() -> None:
    report = read(b"x\n" * (MAX_ISSUES + 50))[1]

    assert report.num_errors == MAX_ISSUES + 50
    assert [issue.line for issue in report.issues] == list(range(1, MAX_ISSUES + 1))


@pytest.mark.parametrize("mebibytes", [17, 64])
def test_a_line_of_any_length_is_skipped_in_flat_memory(tmp_path: Path, mebibytes: int) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        # The head is text, as a hole of zeros at once would be taken for UTF-16.
        file.write(b'{"messages": "' + b"a" * 8192)
        file.truncate(mebibytes * 2**20)
        file.seek(0, io.SEEK_END)
        file.write(b"\n" + GOOD + b"\n")
    tracemalloc.start()
    try:
        report = check_file(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert [str(issue) for issue in report.issues] == ["line 1: the line is longer than 16 MiB"]
    assert (report.num_lines, report.num_conversations) == (2, 1)
    assert peak < 3 * MAX_LINE_BYTES


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_line_at_the_limit_never_swallows_the_next_one(extra: int) -> None:
    start, end = GOOD[:-2] + b', {"role": "assistant", "content": "', b'"}]}'
    padding = MAX_LINE_BYTES + extra - len(start) - len(end) - 1
    long = start + b"a" * padding + end + b"\n"
    assert len(long) == MAX_LINE_BYTES + extra
    _, report = read(long + GOOD + b"\n" + GOOD[:1])

    is_too_long = extra > 0
    assert report.num_lines == 3
    assert report.num_conversations == 2 - is_too_long
    assert report.num_errors == 1 + is_too_long


def test_the_report_counts_what_is_in_the_file() -> None:
    system = {"role": "system", "content": "Be brief."}
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "17:50"}
    thinking = {**ASSISTANT, "reasoning_content": "Two years."}
    report = read(
        line(system, USER, ASSISTANT, USER, ASSISTANT)
        + b"\n"
        + line(USER, call, result, ASSISTANT)
        + b"\n"
        + line(USER, thinking)
    )[1]

    assert report.roles == {"system": 1, "user": 4, "assistant": 5, "tool": 1}
    assert report.num_messages == 11
    assert report.num_conversations == 3
    assert (report.num_multi_turn, report.num_with_system) == (1, 1)
    assert (report.num_with_reasoning, report.num_with_tools) == (1, 1)
    assert report.num_characters == 9 + 4 * len("Is it covered?") + 4 * len(
        "Yes, for 31 months."
    ) + len("17:50")


def test_the_example_dataset_has_no_findings() -> None:
    report = check_file(TEMPLATES / "data" / "tidemark-support.jsonl")

    assert report.is_accepted
    assert report.issues == ()
    assert report.num_conversations == 200


@pytest.mark.parametrize(
    ("name", "reason"), [("none.jsonl", "no such file or directory"), (".", "is a directory")]
)
def test_a_file_that_cannot_be_opened_is_an_input_error(
    tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_file(tmp_path / name)

    assert caught.value.message == f"The file {tmp_path / name} cannot be read: {reason}."


def mutate(positions: list[tuple[int, int]]) -> bytes:
    content = bytearray(
        line(
            {"role": "system", "content": "é\U0001f30a"},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "x"},
            ASSISTANT,
            tools=[{"type": "function", "function": {"name": "get", "parameters": {"n": 1.5}}}],
        )
    )
    for position, value in positions:
        content[position % len(content)] = value
    return bytes(content)


SPOTS = st.tuples(st.integers(0, 10_000), st.sampled_from(b'{}[]",:\\ud80123eE-.NI \n\xe9\xf0'))


@given(st.binary(max_size=200) | st.lists(SPOTS, max_size=4).map(mutate))
def test_any_bytes_give_a_report_and_only_conversations_that_read_back(content: bytes) -> None:
    conversations, report = read(content)

    assert report.num_conversations == len(conversations)
    assert report.is_accepted == (report.num_errors == 0)
    assert conversations or report.num_errors
    for conversation in conversations:
        assert Conversation.from_json(conversation.to_json()) == conversation
    for issue in report.issues:
        assert str(issue).isprintable()
        assert Issue.model_validate_json(issue.model_dump_json()) == issue
