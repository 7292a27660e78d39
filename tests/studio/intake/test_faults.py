"""The catalogue of bad files: each is refused, or noted, with one exact sentence."""

import codecs
import gzip
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio.domain.conversation import Conversation
from studio.domain.validation import Report
from studio.intake.archive import Limits
from studio.intake.read import Reader

USER = {"role": "user", "content": "Is it covered?"}
ASSISTANT = {"role": "assistant", "content": "Yes, for 31 months."}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "17:50"}


def line(*messages: object, **fields: object) -> bytes:
    return json.dumps({"messages": messages, **fields}).encode()


def called(arguments: object) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"function": function}]}


def one(value: object) -> bytes:
    """Return a good line and one with this value instead of a record."""
    return GOOD + b"\n" + json.dumps(value).encode()


GOOD = line(USER, ASSISTANT)
NESTED = b"[" * 100_000 + b"]" * 100_000
TOO_DEEP = "the record is nested more than 100 levels deep"
CONTROL = "a control token of the chat format stands in the text"
ROLES = "input should be 'system', 'developer', 'user', 'assistant' or 'tool'"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[Any], Report]]:
    """Return a function that reads a file of the bytes it is given."""

    def read(content: bytes, limits: Limits | None = None) -> tuple[list[Any], Report]:
        path = tmp_path / "data.jsonl"
        path.write_bytes(content)
        reader = Reader(limits)
        records = list(reader.read(path))
        return records, reader.report()

    return read


Read = Callable[..., tuple[list[Any], Report]]

# ---- what is refused --------------------------------------------------------------------------

BAD: dict[str, tuple[bytes, str]] = {
    "D03 CR only": (
        GOOD + b"\r" + GOOD + b"\r",
        "The file has no line feeds: its lines end with a carriage return only. Save it with line ends of Unix or Windows.",
    ),
    "D04 UTF-16 little endian": (
        GOOD.decode().encode("utf-16"),
        "The text is encoded as UTF-16 (it begins with FF FE). Save it as UTF-8.",
    ),
    "D04 UTF-16 big endian": (
        codecs.BOM_UTF16_BE + GOOD.decode().encode("utf-16-be"),
        "The text is encoded as UTF-16 (it begins with FE FF). Save it as UTF-8.",
    ),
    "D04 UTF-16 without a mark": (
        GOOD.decode().encode("utf-16-le"),
        "The text is encoded as UTF-16. Save it as UTF-8.",
    ),
    "D04 UTF-32": (
        GOOD.decode().encode("utf-32"),
        "The text is encoded as UTF-32 (it begins with FF FE 00 00). Save it as UTF-8.",
    ),
    "D05 Latin-1": (
        (GOOD + b"\n") * 6 + b'{"messages": "caf\xe9"}',
        "line 7: byte 18 of the line is not UTF-8 (found 0xe9)",
    ),
    "D07 surrogate in content": (
        line(USER, {"role": "assistant", "content": "a\ud83d"}),
        "line 1, messages[1].content: an unpaired surrogate stands for no character (found a\\ud83d)",
    ),
    "D07 surrogate in arguments": (
        line(USER, called('{"a": ["\\ud83d"]}')),
        'line 1, messages[1].tool_calls[0].function.arguments: in the arguments, a[0]: an unpaired surrogate stands for no character (found {"a": ["\\ud83d"]})',
    ),
    "D07 surrogate in a key": (
        line(USER, ASSISTANT, tools=[{"\ud83d": 1}]),
        "line 1, tools[0].\\ud83d: an unpaired surrogate stands for no character (found \\ud83d)",
    ),
    "D08 raw control character": (
        GOOD.replace(b"Yes", b"Y\0s"),
        'line 1: not JSON: invalid control character at column 97 (found {"messages": [{"role": "user", "content": "Is it covered?"}, {"role": "assistan…)',
    ),
    "D09 empty": (b"", "the file holds no records"),
    "D09 blank": (b"\n  \n\r\n\t\n", "the file holds no records"),
    "D11 cut behind a key": (
        GOOD + b"\n" + GOOD[:40],
        "line 2: the record is cut off at column 41; upload the file again",
    ),
    "D11 cut in a text": (
        GOOD + b"\n" + GOOD[:60],
        "line 2: the record is cut off at column 61; upload the file again",
    ),
    "D11 cut in a character": (
        GOOD + b'\n{"messages": "caf\xc3',
        "line 2: the record is cut off at column 18; upload the file again",
    ),
    "D11 cut in an escape": (
        GOOD + b'\n{"messages": "\\u00',
        "line 2: the record is cut off at column 19; upload the file again",
    ),
    "D11 cut in a word": (
        GOOD + b'\n{"messages": nul',
        "line 2: the record is cut off at column 17; upload the file again",
    ),
    "D11 cut before the end": (
        GOOD + b"\n" + GOOD[:-1],
        "line 2: the record is cut off at column 118; upload the file again",
    ),
    "D16 100,000 levels": (one(1)[:-1] + b'{"messages": ' + NESTED + b"}", f"line 2: {TOO_DEEP}"),
    "D16 levels that Python reads but the store cannot": (
        GOOD + b'\n{"messages": ' + NESTED[99_800:100_200] + b"}",
        f"line 2: {TOO_DEEP}",
    ),
    "D17 5,000 digits": (
        GOOD + b'\n{"messages": ' + b"7" * 5000 + b"}",
        "line 2: a number has 5000 digits; at most 4300 are read",
    ),
    "D17 beyond a float": (
        GOOD + b'\n{"messages": 1e999}',
        "line 2: the number is too large (found 1e999)",
    ),
    "D18 NaN": (
        line(USER, ASSISTANT, tools=[{"a": float("nan")}]),
        "line 1: not JSON: NaN is not a JSON number",
    ),
    "D18 Infinity": (
        line(USER, ASSISTANT, tools=[{"a": -float("inf")}]),
        "line 1: not JSON: -Infinity is not a JSON number",
    ),
    "D19 key twice": (
        GOOD[:-1] + b', "messages": []}',
        "line 1, messages: the key stands twice in one object",
    ),
    "D19 key twice in a message": (
        GOOD.replace(b'"role"', b'"role": "user", "role"', 1),
        "line 1, role: the key stands twice in one object",
    ),
    "D20 two records on a line": (
        GOOD + b" " + GOOD,
        'line 1: not JSON: extra data at column 120 (found {"messages": [{"role": "user", "content": "Is it covered?"}, {"role": "assistan…)',
    ),
    "D20 trailing text": (
        GOOD + b"\n" + GOOD + b",",
        'line 2: not JSON: extra data at column 119 (found {"messages": [{"role": "user", "content": "Is it covered?"}, {"role": "assistan…)',
    ),
    "D26 text": (one("text"), "line 2: a record is an object with named fields (found text)"),
    "D26 list": (one([1]), "line 2: a record is an object with named fields (found [1])"),
    "D26 null": (one(None), "line 2: a record is an object with named fields (found null)"),
    "D26 number": (one(5), "line 2: a record is an object with named fields (found 5)"),
    "D27 messages missing": (
        one({"id": 1}),
        'line 2, messages: the list `messages` is missing (found ["id"])',
    ),
    "D27 messages null": (
        one({"messages": None}),
        "line 2, messages: a list is expected (found null)",
    ),
    "D27 messages no list": (
        one({"messages": {"role": "user"}}),
        'line 2, messages: a list is expected (found {"role": "user"})',
    ),
    "D27 messages empty": (
        one({"messages": []}),
        "line 2, messages: at least one entry is expected (found [])",
    ),
    "D27 message no object": (
        one({"messages": ["hello"]}),
        "line 2, messages[0]: an object is expected (found hello)",
    ),
    "D28 role bot": (
        line(USER, ASSISTANT, {"role": "bot", "content": "a"}),
        f"line 1, messages[2].role: {ROLES} (found bot)",
    ),
    "D28 role User": (
        line({"role": "User", "content": "a"}, ASSISTANT),
        f"line 1, messages[0].role: {ROLES} (found User)",
    ),
    "D28 role an object": (
        line({"role": {"a": 1}, "content": "a"}, ASSISTANT),
        f'line 1, messages[0].role: {ROLES} (found {{"a": 1}})',
    ),
    "D28 role with control characters": (
        line({"role": "bo\nt\x1b[31m", "content": "a"}),
        f"line 1, messages[0].role: {ROLES} (found bo\\nt\\x1b[31m)",
    ),
    "D29 role missing": (
        line({"content": "a"}, ASSISTANT),
        'line 1, messages[0].role: this field is missing (found {"content": "a"})',
    ),
    "D30 content missing": (
        line({"role": "user"}, ASSISTANT),
        'line 1, messages[0]: content is missing; only an assistant that calls tools may omit it (found {"role": "user"})',
    ),
    "D30 content null": (
        line({"role": "user", "content": None}, ASSISTANT),
        'line 1, messages[0]: content is missing; only an assistant that calls tools may omit it (found {"role": "user", "content": null})',
    ),
    "D30 content null without calls": (
        line(USER, {"role": "assistant", "content": None}),
        'line 1, messages[1]: content is missing; only an assistant that calls tools may omit it (found {"role": "assistant", "content": null})',
    ),
    "D31 content a number": (
        line({"role": "user", "content": 5}, ASSISTANT),
        "line 1, messages[0].content: text or a list of parts is expected (found 5)",
    ),
    "D31 content a bool": (
        line({"role": "user", "content": True}, ASSISTANT),
        "line 1, messages[0].content: text or a list of parts is expected (found true)",
    ),
    "D31 content an object": (
        line({"role": "user", "content": {"a": 1}}, ASSISTANT),
        'line 1, messages[0].content: text or a list of parts is expected (found {"a": 1})',
    ),
    "D32 unknown part": (
        line({"role": "user", "content": [{"type": "video", "url": "a"}]}, ASSISTANT),
        'line 1, messages[0].content: part 0 is of type \'video\'; text and images are known (found [{"type": "video", "url": "a"}])',
    ),
    "D32 part without text": (
        line({"role": "user", "content": [{"type": "text"}]}, ASSISTANT),
        'line 1, messages[0].content: part 0 has no text (found [{"type": "text"}])',
    ),
    "D33 audio": (
        line({"role": "user", "content": [{"type": "input_audio", "data": "a"}]}, ASSISTANT),
        'line 1, messages[0].content: part 0 is of type \'input_audio\'; text and images are known (found [{"type": "input_audio", "data": "a"}])',
    ),
    "D33 image without a reference": (
        line({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT),
        'line 1, messages[0].content: part 0 is an image without a reference (found [{"type": "image_url"}])',
    ),
    "D35 arguments no JSON": (
        line(USER, called("{a")),
        "line 1, messages[1].tool_calls[0].function.arguments: the arguments are not JSON: expecting property name enclosed in double quotes at column 2 (found {a)",
    ),
    "D35 arguments a list": (
        line(USER, called("[1]")),
        "line 1, messages[1].tool_calls[0].function.arguments: the arguments are JSON, but not an object (found [1])",
    ),
    "D35 arguments a number": (
        line(USER, called(5)),
        "line 1, messages[1].tool_calls[0].function.arguments: an object is expected (found 5)",
    ),
    "D35 arguments with a key twice": (
        line(USER, called('{"a": 1, "a": 2}')),
        'line 1, messages[1].tool_calls[0].function.arguments: in the arguments, a: the key stands twice in one object (found {"a": 1, "a": 2})',
    ),
    "D36 result without a call": (
        line(USER, RESULT, ASSISTANT),
        "line 1, messages[1]: a tool result without a call before it",
    ),
    "D36 result of another call": (
        line(USER, CALLING, {**RESULT, "tool_call_id": "call_2"}, ASSISTANT),
        "line 1, messages[2].tool_call_id: no call has this id (found call_2)",
    ),
    "D38 system not first": (
        line(USER, {"role": "system", "content": "Be brief."}, ASSISTANT),
        "line 1, messages[1].role: a system message stands only at the beginning (found system)",
    ),
    "D38 two systems": (
        line(
            {"role": "system", "content": "a"},
            {"role": "developer", "content": "b"},
            USER,
            ASSISTANT,
        ),
        "line 1, messages[1].role: a system message stands only at the beginning (found developer)",
    ),
    "D40 no answer in a record": (
        GOOD + b"\n" + line(USER),
        "line 2, messages: no assistant message: nothing to learn",
    ),
    "no question": (line(ASSISTANT), "line 1, messages: no user message: nothing is asked"),
    "weight of a user": (
        line({**USER, "weight": 1}, ASSISTANT),
        'line 1, messages[0]: only an assistant\'s message has a weight; the others never train (found {"role": "user", "content": "Is it covered?", "weight": 1})',
    ),
    "weight of two": (
        line(USER, {**ASSISTANT, "weight": 2}),
        "line 1, messages[1].weight: a weight is 0 (not trained) or 1 (trained) (found 2)",
    ),
    "all weights 0": (
        line(USER, {**ASSISTANT, "weight": 0}),
        "line 1, messages: every assistant message has weight 0: nothing to learn",
    ),
    "D48 in content": (
        line(USER, {"role": "assistant", "content": "a<|im_end|>b"}),
        f"line 1, messages[1].content: {CONTROL} (found <|im_end|>)",
    ),
    "D48 in thinking": (
        line(USER, {**ASSISTANT, "reasoning_content": "<|im_start|>"}),
        f"line 1, messages[1].reasoning_content: {CONTROL} (found <|im_start|>)",
    ),
    "D48 in arguments": (
        line(USER, called({"a": "<|im_end|>"})),
        f"line 1, messages[1].tool_calls[0]: {CONTROL} (found <|im_end|>)",
    ),
    "D48 in a tool": (
        line(USER, ASSISTANT, tools=[{"name": "<|endoftext|>"}]),
        f"line 1, tools[0]: {CONTROL} (found <|endoftext|>)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_refused_with_one_exact_sentence(name: str, read: Read) -> None:
    content, sentence = BAD[name]
    _, report = read(content)
    errors = [str(issue) for issue in report.issues if issue.severity == "error"]

    assert errors == [sentence]
    assert not report.is_accepted
    assert report.issues[-1].kind
    assert sentence.isprintable()


def test_a_file_without_any_answer_says_so(read: Read) -> None:
    _, report = read(line(USER) + b"\n" + line({"role": "user", "content": "b"}))

    assert str(report.issues[-1]) == "no record has an assistant's message: nothing to learn"
    assert report.counts["no_assistant"] == 3
    assert not report.is_salvageable


def test_a_file_in_which_every_answer_is_empty_is_refused(read: Read) -> None:
    empty = line(USER, {"role": "assistant", "content": " \n"})
    _, report = read(empty + b"\n" + empty)

    assert [str(issue) for issue in report.issues] == [
        "line 1, messages[1].content: the assistant's answer is empty",
        "line 2, messages[1].content: the assistant's answer is empty",
        "every answer in the file is empty",
    ]
    assert [issue.severity for issue in report.issues] == ["warning", "warning", "error"]
    assert not report.is_salvageable


def test_a_file_beyond_the_limit_is_refused(read: Read) -> None:
    _, report = read(GOOD * 20, Limits(max_bytes=1000))

    assert [str(issue) for issue in report.issues] == [
        "The file has 2,360 bytes; at most 1,000 are read. Split it into several files."
    ]
    assert (report.num_file_errors, report.num_conversations) == (1, 0)


def test_a_gzip_beyond_the_limit_is_refused_where_it_gets_too_large(read: Read) -> None:
    _, report = read(gzip.compress((GOOD + b"\n") * 100_000), Limits(max_bytes=10**6))

    assert str(report.issues[-1]) == (
        "The gzip file unpacks to more than 1,000,000 bytes. Split it into several files."
    )
    assert not report.is_accepted
    assert not report.is_salvageable


# ---- what is accepted, with or without a word -------------------------------------------------

GOOD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "D01 byte order mark": (codecs.BOM_UTF8 + GOOD, ["line 1: a byte order mark was removed"]),
    "D02 Windows line ends": (GOOD + b"\r\n", []),
    "D06 separators of Unicode": (
        json.dumps(
            {"messages": [{"role": "user", "content": "a\u2028b\u2029c\x85"}, ASSISTANT]},
            ensure_ascii=False,
        ).encode(),
        [],
    ),
    "D08 NUL escaped": (
        line({"role": "user", "content": "ab\0"}, ASSISTANT),
        [
            "line 1, messages[0].content: a control character stands at character 3 of the text "
            "(found \\x00)"
        ],
    ),
    "D08 escape character": (
        line(USER, {"role": "assistant", "content": "\x1b[31mred"}),
        [
            "line 1, messages[1].content: a control character stands at character 1 of the text "
            "(found \\x1b)"
        ],
    ),
    "D08 what only looks like one": (
        line(USER, {"role": "assistant", "content": "\\b \\\\f \\u0000 é\t\r\n"}),
        [],
    ),
    "D10 blank lines": (b"\n\n" + GOOD + b"\n \n", []),
    "D12 no line feed at the end": (GOOD, []),
    "D32 text parts": (
        line({"role": "user", "content": [{"type": "text", "text": "a"}]}, ASSISTANT),
        [],
    ),
    "a pair of surrogates": (line(USER, {"role": "assistant", "content": "\U0001f30a"}), []),
    "developer": (line({"role": "developer", "content": "Be brief."}, USER, ASSISTANT), []),
    "calls and their results": (
        line(USER, CALLING, RESULT, ASSISTANT, tools=[{"function": {"name": "get"}}]),
        [],
    ),
    "a call at the end": (line(USER, CALLING), []),
    "D39 starts with the assistant": (
        line(ASSISTANT, USER, ASSISTANT),
        [
            "line 1, messages[0].role: the conversation starts with the assistant; some chat "
            "templates refuse that"
        ],
    ),
    "D39 two users in a row": (
        line(USER, USER, ASSISTANT),
        ["line 1, messages[1].role: two user messages in a row; some chat templates refuse that"],
    ),
    "D41 an empty answer before a full one": (
        line(USER, {"role": "assistant", "content": ""}, USER, ASSISTANT),
        ["line 1, messages[1].content: the assistant's answer is empty"],
    ),
    "a call without a result": (
        line(USER, CALLING, USER, ASSISTANT),
        ["line 1, messages[1].tool_calls[0]: the call has no result (found call_1)"],
    ),
    "one of two calls without a result": (
        line(
            USER,
            {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
            {**RESULT, "tool_call_id": "call_2"},
        ),
        ["line 1, messages[1].tool_calls[0]: the call has no result (found call_1)"],
    ),
    "a tool that is not declared": (
        line(USER, CALLING, RESULT, ASSISTANT, tools=[{"function": {"name": "set"}}]),
        [
            "line 1, messages[1].tool_calls[0].function.name: the conversation's tools declare "
            "none of this name (found get)"
        ],
    ),
    "D47 fields that nothing reads": (
        line(USER, {**ASSISTANT, "refusal": None}, id="a", metadata={"source": [1, 2]}),
        [
            "id: the field is not read; 1 record has it",
            "messages[].refusal: the field is not read; 1 record has it",
            "metadata: the field is not read; 1 record has it",
        ],
    ),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_what_is_unusual_is_accepted_and_told(name: str, read: Read) -> None:
    content, sentences = GOOD_FILES[name]
    records, report = read(content)

    assert len(records) == 1
    assert isinstance(records[0], Conversation)
    assert sorted(str(issue) for issue in report.issues) == sentences
    assert all(issue.kind and issue.severity != "error" for issue in report.issues)
    assert report.is_accepted
    assert report.num_rejected == 0


def test_separators_of_unicode_stay_in_the_text(read: Read) -> None:
    records, report = read(GOOD_FILES["D06 separators of Unicode"][0] + b"\n" + GOOD)

    assert records[0].messages[0].content == "a\u2028b\u2029c\x85"
    assert report.num_lines == 2


def test_windows_and_unix_line_ends_give_the_same_records(read: Read) -> None:
    assert read(GOOD + b"\r\n" + GOOD + b"\r\n")[0] == read(GOOD + b"\n" + GOOD)[0]


def test_blank_lines_are_counted(read: Read) -> None:
    report = read(b"\n\n" + GOOD + b"\n \r\n" + GOOD + b"\n")[1]

    assert (report.num_lines, report.num_blank_lines, report.num_conversations) == (5, 3, 2)


def test_an_image_is_kept_by_reference_and_never_fetched(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a reader opens no connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    ref = "http://127.0.0.1:9/secret.png"
    part = {"type": "image_url", "image_url": {"url": ref}}
    records, report = read(line({"role": "user", "content": [part]}, ASSISTANT))

    assert [image.ref for image in records[0].messages[0].images] == [ref]
    assert report.num_with_images == 1
    assert report.is_accepted


def test_megabytes_of_fields_that_nothing_reads_are_passed_over(read: Read) -> None:
    fields = {f"field_{number}": "a" * 5000 for number in range(2000)}
    records, report = read(line(USER, ASSISTANT, **fields))

    assert len(records) == 1
    assert records[0].to_line() == read(GOOD)[0][0].to_line()
    assert len(report.issues) == 20
    assert report.counts["unknown_field"] == 21
    assert report.is_accepted


# ---- lines of any length ----------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from studio.intake.read import check_file
first = check_file(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = check_file(Path(sys.argv[2]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(*report.issues, report.num_conversations, after - before, sep="\\n")
"""


def test_a_line_of_600_megabytes_is_skipped_in_flat_memory(tmp_path: Path) -> None:
    good, long = tmp_path / "good.jsonl", tmp_path / "long.jsonl"
    good.write_bytes(GOOD)
    with long.open("wb") as file:
        # The head is text, as a hole of zeros at once would be taken for UTF-16.
        file.write(b'{"messages": "' + b"a" * 2**17)
        file.truncate(600 * 10**6)
        file.seek(0, io.SEEK_END)
        file.write(b"\n" + GOOD + b"\n")
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, good, long], capture_output=True, text=True, check=True
    )
    sentence, num_records, growth_kib = answer.stdout.splitlines()

    assert sentence == "line 1: the line is longer than 16 MiB"
    assert num_records == "1"
    assert int(growth_kib) < 100 * 10**6 / 1024


# ---- archives ---------------------------------------------------------------------------------


def test_findings_in_an_archive_name_the_file_with_what_cannot_be_printed_escaped(
    read: Read,
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", GOOD)
        archive.writestr("b\u202e;rm -rf\n🌊.jsonl", GOOD + b"\n{")
    records, report = read(buffer.getvalue())

    assert len(records) == 2
    assert [str(issue) for issue in report.issues] == [
        "b\\u202e;rm -rf\\n🌊.jsonl, line 2: the record is cut off at column 2; upload the file again"
    ]


def test_an_archive_of_two_kinds_is_refused(read: Read) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", GOOD)
        archive.writestr("b.jsonl", b'{"text": "The tide is high."}\n' * 2)
    _, report = read(buffer.getvalue())

    assert [str(issue) for issue in report.issues] == [
        "b.jsonl: The file holds texts, but those before it in the archive conversations. "
        "Upload each kind by itself."
    ]
    assert not report.is_salvageable
