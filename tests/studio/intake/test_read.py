"""A file of any layout gives its good records, and a Report that counts the others."""

import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.disk import TEMPLATES
from studio.domain.conversation import Conversation, Kind, PlainText, Preference, Record
from studio.domain.validation import MAX_ISSUES, MAX_ISSUES_PER_KIND, Issue, Report
from studio.errors import InputError
from studio.intake.convert import convert
from studio.intake.fast import read_line
from studio.intake.formats import Format, Mapping
from studio.intake.lines import HEAD_BYTES, MAX_LINE_BYTES, holds_controls, read_blocks
from studio.intake.read import Reader, check_file

USER = {"role": "user", "content": "Is it covered?"}
ASSISTANT = {"role": "assistant", "content": "Yes, for 31 months."}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
EXAMPLE = TEMPLATES / "data" / "tidemark-support.jsonl"


def line(*messages: object, **fields: object) -> bytes:
    return json.dumps({"messages": messages, **fields}).encode()


GOOD = line(USER, ASSISTANT)


def read(path: Path, content: bytes, **given: Any) -> tuple[list[Record], Report]:
    file = path / "data"
    file.write_bytes(content)
    reader = Reader(**given)
    return list(reader.read(file)), reader.report()


# ---- layouts and formats ----------------------------------------------------------------------


def test_the_same_records_are_read_from_every_layout(tmp_path: Path) -> None:
    lines = EXAMPLE.read_bytes()
    array = json.dumps([json.loads(line) for line in lines.splitlines()], indent=1).encode()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("data/a.jsonl", lines[: lines.index(b"\n") + 1])
        archive.writestr("data/b.jsonl", lines[lines.index(b"\n") + 1 :])
    records, report = read(tmp_path, lines)

    assert len(records) == 200
    assert report.format == "OpenAI messages, JSON lines"
    assert read(tmp_path, array)[0] == records
    assert read(tmp_path, array)[1].format == "OpenAI messages, JSON array"
    assert read(tmp_path, gzip.compress(lines))[0] == records
    assert read(tmp_path, zipped.getvalue())[0] == records


@pytest.mark.parametrize(
    ("value", "kind", "form", "record"),
    [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            Kind.CONVERSATIONS,
            "ShareGPT, JSON lines",
            Conversation,
        ),
        (
            {"instruction": "a", "input": "", "output": "b"},
            Kind.CONVERSATIONS,
            "Alpaca, JSON lines",
            Conversation,
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            Kind.PREFERENCES,
            "preference pairs, JSON lines",
            Preference,
        ),
        ({"text": "a"}, Kind.TEXTS, "plain text, JSON lines", PlainText),
    ],
)
def test_other_formats_become_records_of_their_kind(
    tmp_path: Path, value: dict[str, Any], kind: Kind, form: str, record: type[Record]
) -> None:
    content = (json.dumps({**value, "source": "x"}) + "\n").encode() * 3
    records, report = read(tmp_path, content)

    assert [type(one) for one in records] == [record] * 3
    assert (report.kind, report.format, report.num_conversations) == (kind, form, 3)
    assert report.is_accepted
    assert [str(issue) for issue in report.issues] == [
        "source: the field is not read; 3 records have it"
    ]


def test_a_table_of_unknown_columns_asks_what_they_mean(tmp_path: Path) -> None:
    table = b"ask,reply text,note\nWhen is high tide?,At six.,x\nAnd low?,At noon.,y\n"
    _, report = read(tmp_path, table)

    assert report.columns == ("ask", "reply text", "note")
    assert (report.num_errors, report.num_file_errors) == (1, 1)
    assert not report.is_salvageable

    mapping = Mapping(user="ask", assistant="reply text")
    records, report = read(tmp_path, table, mapping=mapping)

    assert [len(r.messages) for r in records if isinstance(r, Conversation)] == [2, 2]
    assert report.format == "chosen columns, CSV"
    assert [str(issue) for issue in report.issues] == [
        "note: the field is not read; 2 records have it"
    ]


def test_a_record_of_another_format_is_refused_by_its_line(tmp_path: Path) -> None:
    other = json.dumps({"chosen": "a", "rejected": "b", "prompt": "c"}).encode()
    both = line(USER, ASSISTANT, chosen="a", rejected="b")
    records, report = read(tmp_path, b"\n".join((GOOD, GOOD, other, both, GOOD)))

    assert len(records) == 3
    assert [issue.line for issue in report.issues] == [3, 4]
    assert all("another format" in issue.reason for issue in report.issues)


@given(st.sampled_from([{}, {"id": 1}, {"metadata": {"a": [1]}}]), st.booleans())
def test_the_fast_way_agrees_with_the_converter(extra: dict[str, Any], has_tools: bool) -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "get"}}]} if has_tools else {}
    value = {"messages": [USER, {**ASSISTANT, "tool_calls": [CALL]}], **tools, **extra}
    fast = read_line(json.dumps(value).encode())

    assert fast is not None
    assert fast.conversation == convert(value, Format.OPENAI)


# ---- what the name says -----------------------------------------------------------------------


def said(report: Report) -> list[str]:
    return [str(issue) for issue in report.issues]


def read_named(
    folder: Path, content: bytes, name: str, stored: str = "data"
) -> tuple[list[Record], Report]:
    (folder / stored).write_bytes(content)
    reader = Reader()
    return list(reader.read(folder / stored, name=name)), reader.report()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_that_are_all_bad_are_reported_one_by_one(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    name = "talks.jsonl" if pack is bytes else "talks.jsonl.gz"
    records, report = read_named(tmp_path, pack(b"oops\n\n12, 13\nno\n"), name)

    assert records == []
    assert [(issue.line, issue.kind) for issue in report.issues] == [
        (1, "json"),
        (3, "json"),
        (4, "json"),
    ]
    assert report.num_rejected == 3


@pytest.mark.parametrize("name", ["shadow", "talks.json", "talks"])
def test_words_are_no_text_unless_the_name_says_so(tmp_path: Path, name: str) -> None:
    words = b"root:*:19000:0:99999:7:::\n"
    records, report = read_named(tmp_path, words, name)

    assert records == []
    assert said(report) == [
        "The file is neither JSON, nor a table (CSV, TSV), nor Parquet. Save the data as one of "
        "these. If it is plain text for continued pre-training, rename it to end with .txt."
    ]
    assert (report.num_file_errors, report.is_salvageable) == (1, False)
    assert read_named(tmp_path, words, "book.txt")[0] == [PlainText(text=words.decode())]
    assert read_named(tmp_path, gzip.compress(words), "b.rst.gz")[0] != []
    assert read_named(tmp_path, words, "", stored="book.md")[0] != []


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


BESIDE = {
    "README.txt": b"What this is.",
    "LICENSE": b"Do as you like.",
    "logo.png": b"\x89PNG\r\n\x1a\n",
    "paper.pdf": b"%PDF-1.7",
}


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_stands_beside_the_data_is_passed_over_with_a_note(
    tmp_path: Path, is_folder: bool
) -> None:
    members = {**BESIDE, "a.jsonl": GOOD, ".DS_Store": b"\0\0\0\1Bud1"}
    source = tmp_path / "source"
    if is_folder:
        source.mkdir()
        for name, content in members.items():
            (source / name).write_bytes(content)
    else:
        source.write_bytes(zip_of(members))
    reader = Reader()
    records = list(reader.read(source))
    report = reader.report()

    assert len(records) == 1
    assert report.is_accepted
    assert {(issue.file, issue.kind, issue.severity, issue.line) for issue in report.issues} == {
        (name, "skipped", "note", 0) for name in BESIDE
    }


def test_a_note_alone_in_a_zip_is_read_by_its_name(tmp_path: Path) -> None:
    records, report = read(tmp_path, zip_of({"README.md": b"What this is."}))
    assert records == [PlainText(text="What this is.")]
    assert said(report) == []
    assert "neither JSON" in said(read(tmp_path, zip_of({"LICENSE": b"Do as you like."}))[1])[0]


def test_the_members_of_a_zip_are_told_by_their_own_names(tmp_path: Path) -> None:
    _, report = read_named(tmp_path, zip_of({"a.jsonl": b"oops", "b.log": b"oops"}), "x.txt.zip")
    assert said(report)[0].startswith("a.jsonl, line 1: not JSON")
    records, _ = read_named(tmp_path, zip_of({"one.txt": b"Once.", "two.md": b"Twice."}), "x.zip")
    assert records == [PlainText(text="Once."), PlainText(text="Twice.")]


def test_a_text_where_a_list_belongs_is_said(tmp_path: Path) -> None:
    _, report = read(tmp_path, b'{"messages": "no"}\n' + GOOD)
    assert said(report) == ["line 1, messages: a list is expected (found no)"]


@pytest.mark.parametrize("name", ["a\u202eb.jsonl", "a\x1b[31m\n.jsonl", "README.\u202e.md"])
def test_the_name_of_a_file_is_shown_escaped(tmp_path: Path, name: str) -> None:
    packed = zip_of({name: b"oops", "good.jsonl": GOOD})
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    (folder / name).write_bytes(b"oops")
    (folder / "good.jsonl").write_bytes(GOOD)
    for report in (read(tmp_path, packed)[1], check_file(folder)):
        assert len(report.issues) == 1
        assert report.issues[0].file == name.encode("unicode_escape").decode()


# ---- the Report -------------------------------------------------------------------------------


def test_the_report_counts_what_is_in_the_file(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "17:50"}
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}
    lines = [
        line(system, USER, ASSISTANT, USER, ASSISTANT),
        line(USER, call, result, ASSISTANT),
        line(USER, {**ASSISTANT, "reasoning_content": "Two years."}),
        line(picture, {**ASSISTANT, "content": "<think>\n\n</think>\n\nNo."}),
    ]
    _, report = read(tmp_path, b"\n".join(lines))

    assert report.roles == {"system": 1, "user": 5, "assistant": 6, "tool": 1}
    assert (report.num_messages, report.num_conversations) == (13, 4)
    assert (report.num_multi_turn, report.num_with_system) == (1, 1)
    assert (report.num_with_reasoning, report.num_empty_think) == (1, 1)
    assert (report.num_with_tools, report.num_with_images) == (1, 1)
    assert report.num_characters == 9 + 4 * 14 + 4 * 19 + 5 + 3


def test_roles_are_counted_right_however_many_shapes_there_are(tmp_path: Path) -> None:
    lines = [line(*[USER, ASSISTANT] * (1 + number)) for number in range(1200)]
    _, report = read(tmp_path, b"\n".join(lines))

    assert report.roles["user"] == sum(range(1, 1201))
    assert report.num_multi_turn == 1199


def test_one_kind_of_finding_does_not_hide_the_others(tmp_path: Path) -> None:
    _, report = read(tmp_path, GOOD + b"\n" + b"x\n" * 500 + line(USER) + b"\n" + GOOD)

    assert [issue.kind for issue in report.issues] == ["json"] * MAX_ISSUES_PER_KIND + [
        "no_assistant"
    ]
    assert report.counts == {"json": 500, "no_assistant": 1}
    assert (report.num_errors, report.num_rejected, report.num_conversations) == (501, 501, 2)
    assert len(report.issues) <= MAX_ISSUES
    assert report.is_salvageable
    assert not report.is_accepted


def test_rejects_are_written_with_their_text_and_findings(tmp_path: Path) -> None:
    kept = io.BytesIO()
    bad = line(USER, {"role": "assistant", "content": "a<|im_end|>"})
    long = b'{"messages": "' + b"a" * 100_000 + b'"}'
    content = b"\n".join((GOOD, b"\xff{", bad, long, line(ASSISTANT, USER, ASSISTANT)))
    records, report = read(tmp_path, content, keep_rejects=kept)
    rejects = [json.loads(line) for line in kept.getvalue().splitlines()]

    assert [reject["line"] for reject in rejects] == [2, 3, 4]
    assert [reject["file"] for reject in rejects] == ["", "", ""]
    assert rejects[0]["text"] == "\\xff{"
    assert rejects[1]["text"] == bad.decode()
    assert len(rejects[2]["text"]) == HEAD_BYTES
    assert rejects[1]["findings"] == [
        {
            "kind": "control_token",
            "path": "messages[1].content",
            "value": "<|im_end|>",
            "reason": "a control token of the chat format stands in the text",
            "severity": "error",
        }
    ]
    assert len(records) == 2
    assert report.num_rejected == 3


def test_the_example_dataset_has_no_findings() -> None:
    report = check_file(EXAMPLE)

    assert report.is_accepted
    assert report.issues == ()
    assert report.num_conversations == 200


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes((GOOD + b"\n") * 50_000)
    shares: list[float] = []
    check_file(path, progress=shares.append)

    assert shares == sorted(shares)
    assert len(shares) > 10
    assert 0 < shares[0] < 0.5
    assert shares[-1] == 1.0


def test_a_file_that_cannot_be_opened_is_an_input_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError) as caught:
        check_file(tmp_path / "none.jsonl")
    reason = "cannot be read: no such file or directory"
    assert caught.value.message == f"The file {tmp_path / 'none.jsonl'} {reason}."
    with pytest.raises(InputError, match="pipe is not a file"):
        check_file(tmp_path / "pipe")


# ---- lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_line_at_the_limit_never_swallows_the_next_one(tmp_path: Path, extra: int) -> None:
    start, end = GOOD[:-2] + b', {"role": "assistant", "content": "', b'"}]}'
    padding = MAX_LINE_BYTES + extra - len(start) - len(end) - 1
    long = start + b"a" * padding + end + b"\n"
    assert len(long) == MAX_LINE_BYTES + extra
    _, report = read(tmp_path, long + GOOD + b"\n" + GOOD[:1])

    is_too_long = extra > 0
    assert report.num_lines == 3
    assert report.num_conversations == 2 - is_too_long
    assert report.num_errors == 1 + is_too_long


@given(
    st.lists(st.sampled_from([b"\n", b"a", b"b" * 70_000, b"c" * 2**17, b" \n"]), max_size=12).map(
        b"".join
    )
)
def test_lines_are_those_between_line_feeds(content: bytes) -> None:
    expected = content.split(b"\n")
    blocks = list(read_blocks(io.BytesIO(content)))
    lines = [line for block in blocks for line in block.lines]

    assert lines == (expected if expected[-1] else expected[:-1])
    assert [block.is_cut for block in blocks][:-1] == [False] * (len(blocks) - 1)
    assert not blocks or blocks[-1].is_cut == bool(expected[-1])
    for block in blocks:
        assert block.lines == lines[block.first - 1 : block.first - 1 + len(block.lines)]


@given(st.text(), st.booleans())
def test_an_escaped_control_character_is_never_overlooked(text: str, ascii_only: bool) -> None:
    control = any(c < " " and c not in "\t\n\r" for c in text)

    assert holds_controls(json.dumps(text, ensure_ascii=ascii_only).encode()) == control


# ---- anything ---------------------------------------------------------------------------------


WHOLE = line(
    {"role": "system", "content": "é\U0001f30a"},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "x"},
    ASSISTANT,
    tools=[{"type": "function", "function": {"name": "get", "parameters": {"n": 1.5}}}],
)
SPOTS = st.tuples(st.integers(0, 10_000), st.sampled_from(b'{}[]",:\\ud80123eE-.NI \n\r\xe9\xf0'))


def mutate(spots: list[tuple[int, int]]) -> bytes:
    content = bytearray(WHOLE)
    for position, value in spots:
        content[position % len(content)] = value
    return bytes(content)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.lists(SPOTS, max_size=4).map(mutate))
def test_any_bytes_give_a_report_and_only_records_that_read_back(
    tmp_path: Path, content: bytes
) -> None:
    records, report = read(tmp_path, content)

    assert report.num_conversations == len(records)
    assert report.is_accepted == (report.num_errors == 0)
    assert records or report.num_errors
    assert sum(report.counts.values()) >= len(report.issues)
    for record in records:
        assert type(record).from_json(record.to_json()) == record
    for issue in report.issues:
        assert str(issue).isprintable()
        assert issue.kind
        assert Issue.model_validate_json(issue.model_dump_json()) == issue
