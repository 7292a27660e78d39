"""The fast way reads exactly what the strict way reads, or leaves it to the strict way."""

import json
import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from studio.disk import TEMPLATES
from studio.domain.conversation import Conversation
from studio.domain.openai_messages import from_openai
from studio.domain.strict_json import parse_json
from studio.intake.fast import Read, read_line
from studio.intake.unread import unread_fields

ODD_TEXTS = (
    *("", " ", '"', '\\"', "a\\", "\\\\", 'say "x" \\"y\\"', '{"role":', "\\u0022"),
    *("<think>a</think>b", "<think></think>", "</think>", "<|im_end|>"),
    *("\0", "\ud83d", "\u2028", "\U0001f30a"),
)
TEXTS = st.text() | st.sampled_from(ODD_TEXTS)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -0.0, 1.5, 10**30, float("nan"), "1", []]) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(st.tuples(TEXTS, inner), max_size=3).map(tuple)
    ),
    max_leaves=6,
)


def optional(*fields: tuple[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[list[Any]]:
    """Draw some of the fields, each nearly never twice."""
    some = st.lists(
        st.one_of([st.tuples(st.just(key), value) for key, value in fields]), max_size=3
    )
    return some.map(lambda pairs: list(dict(pairs).items())) | some


def objects(
    needed: list[tuple[str, st.SearchStrategy[Any]]], more: st.SearchStrategy[list[Any]]
) -> st.SearchStrategy[Any]:
    """Draw objects as tuples of pairs, which may hold a key twice."""
    pairs = st.tuples(*[st.tuples(st.just(key), value) for key, value in needed]).map(list)
    return st.tuples(pairs, more, st.randoms(use_true_random=False)).map(
        lambda drawn: tuple(drawn[2].sample(both := drawn[0] + drawn[1], len(both)))
    )


NOTHING: st.SearchStrategy[list[Any]] = st.just([])
UNREAD = ("id", TEXTS), ("metadata", VALUES), ("a\"'\\b", VALUES), ("rol\u00e9", TEXTS)
ROLES = st.sampled_from(["user", "assistant", "assistant", "tool", "system", "developer", "bot"])
ARGUMENTS = st.sampled_from(['{"a": 1}', "{}", "", "[]", '{"a":1,"a":2}', "{", '{"x": 1e999}'])
FUNCTIONS = objects(
    [("name", TEXTS)],
    optional(("arguments", ARGUMENTS), ("arguments", ARGUMENTS), ("arguments", VALUES)),
)
CALLS = objects(
    [("function", FUNCTIONS)],
    optional(("id", TEXTS | st.none()), ("type", st.just("function")), ("index", st.just(0))),
)
PARTS = objects(
    [("type", st.sampled_from(["text", "text", "image_url"])), ("text", TEXTS)],
    NOTHING | optional(("cache_control", st.none()), ("image_url", TEXTS)),
)
CONTENTS = TEXTS | TEXTS | st.lists(PARTS, max_size=3) | st.none() | VALUES
FIELDS = (
    ("reasoning_content", TEXTS | st.none()),
    ("tool_calls", st.lists(CALLS, max_size=2) | st.none()),
    ("tool_call_id", TEXTS),
    ("name", TEXTS | st.none()),
    ("weight", st.sampled_from([0, 1, 1.0, True, None, 2, "1"])),
    ("function_call", st.none()),
    ("images", VALUES),
)
MESSAGES = objects([("role", ROLES)], optional(("content", CONTENTS), *FIELDS, *UNREAD)) | objects(
    [("role", ROLES), ("content", CONTENTS)],
    NOTHING | optional(("content", CONTENTS), ("role", ROLES), *FIELDS, *UNREAD),
)
RECORDS = objects(
    [("messages", st.lists(MESSAGES, max_size=3))],
    NOTHING
    | optional(
        ("tools", st.lists(VALUES, max_size=2) | st.none()),
        ("tags", VALUES),
        ("messages", st.just([])),
        *UNREAD,
    ),
)


class Spelling:
    """Writes JSON in one of the many ways that mean the same."""

    def __init__(self, seed: int, oddness: float) -> None:
        self._random = random.Random(seed)
        self._oddness = oddness
        self._ascii = self._random.random() < 0.5

    def text(self, value: str) -> str:
        """Write a text."""

        def character(c: str) -> str:
            escape = self._random.random() < self._oddness and ord(c) < 0x10000
            return f"\\u{ord(c):04x}" if escape else json.dumps(c, ensure_ascii=self._ascii)[1:-1]

        return '"' + "".join(map(character, value)) + '"'

    def space(self) -> str:
        """Write space where any may stand."""
        return self._random.choice(" \t\r") if self._random.random() < self._oddness else ""

    def value(self, value: Any) -> str:
        """Write a value; an object is a tuple of pairs."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            inner = ",".join(self.space() + self.value(item) + self.space() for item in value)
            return f"[{inner}]"
        if isinstance(value, tuple):
            inner = ",".join(
                f"{self.space()}{self.text(key)}{self.space()}:{self.space()}{self.value(item)}"
                for key, item in value
            )
            return f"{{{inner}{self.space()}}}"
        return json.dumps(value)


def strictly(line: bytes) -> Read | None:
    try:
        value = parse_json(line.decode("utf-8"))
        return Read(from_openai(value), unread_fields(value))
    except ValueError:
        return None


def assert_same(line: bytes) -> None:
    read = read_line(line)
    if read is not None:
        strict = strictly(line)
        assert strict is not None
        # repr tells 1 from 1.0 and from True, which are equal.
        assert repr(read.conversation) == repr(strict.conversation)
        assert read.unread == strict.unread


@settings(max_examples=400)
@given(RECORDS, st.integers(0, 2**32), st.sampled_from([0.0, 0.0, 0.02, 0.3]))
def test_whatever_the_fast_way_reads_the_strict_way_reads_alike(
    record: Any, seed: int, oddness: float
) -> None:
    # Half a pair is no UTF-8; the escape of it is what a file can hold.
    line = Spelling(seed, oddness).value(record).encode("utf-8", errors="backslashreplace")
    assert_same(line)


SPOTS = st.tuples(st.integers(0, 10_000), st.sampled_from(b'{}[]",:\\ud80123eE-.NI \n\xe9\xf0\x01'))
WHOLE = json.dumps(
    {
        "messages": [
            {"role": "system", "content": "é\U0001f30a"},
            {"role": "user", "content": [{"type": "text", "text": "Is it?"}], "name": "Ann"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
                "refusal": None,
            },
            {"role": "tool", "tool_call_id": "a", "content": 'x"y'},
            {"role": "assistant", "content": "<think>b</think>c", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"n": 1.5}}}],
        "id": "chat-1",
    }
).encode()


@settings(max_examples=400)
@given(st.lists(SPOTS, min_size=1, max_size=4))
def test_a_damaged_line_is_never_read_otherwise(spots: list[tuple[int, int]]) -> None:
    line = bytearray(WHOLE)
    for position, value in spots:
        line[position % len(line)] = value
    assert_same(bytes(line))


@given(st.binary(max_size=60))
@example(b'{"messages":' + b"[" * 100_000)
@example(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
def test_bytes_that_are_no_record_are_left_to_the_strict_way(line: bytes) -> None:
    assert read_line(line) is None


def messages(*pieces: str) -> bytes:
    return ('{"messages":[' + ",".join(pieces) + "]}").encode()


ASK = '{"role":"user","content":"a"}'


@pytest.mark.parametrize(
    "line",
    [
        messages('{"role":"user","content":"a","content":"b"}'),
        messages('{"role":"user","role":"user","content":"b"}'),
        messages('{"role":"user","content":"a","c\\u006fntent":"b"}'),
        b'{"messages":[' + ASK.encode() + b'],"messages":[' + ASK.encode() + b"]}",
        # What is missing here makes up for what is too many there.
        messages('{"role":"user"}', '{"role":"user","content":"a","name":"b"}'),
        messages('{"role":"user"}', '{"role":"user","content":"a","content":"b"}'),
        # Quotes written as escapes make up for the quotes around a second key.
        messages('{"role":"user","content":"\\u0022\\u0022\\u0022\\u0022","content":"\\u0022"}'),
        messages('{"role":"user","content":"\\u0022\\u0022\\u0022\\u0022","content":"b"}'),
        b'{"\\u0022\\u0022\\u0022\\u0022":1,"a":1,"a":2,"messages":[' + ASK.encode() + b"]}",
        b'{"tools":[{"a":1,"a":2}],"messages":[' + ASK.encode() + b"]}",
        b'{"id":{"a":1,"a":2},"messages":[' + ASK.encode() + b"]}",
        b'{"id":NaN,"messages":[' + ASK.encode() + b"]}",
        b'{"id":"\\ud800","messages":[' + ASK.encode() + b"]}",
        b'{"id":"\xff","messages":[' + ASK.encode() + b"]}",
        b'{"id":' + b"7" * 5000 + b',"messages":[' + ASK.encode() + b"]}",
        b'{"id":' + b"[" * 100 + b"]" * 100 + b',"messages":[' + ASK.encode() + b"]}",
    ],
)
def test_what_the_strict_way_refuses_is_not_read(line: bytes) -> None:
    assert read_line(line) is None
    with pytest.raises(ValueError):  # noqa: PT011  # of whichever kind
        from_openai(parse_json(line.decode()))


@pytest.mark.parametrize(
    "line",
    [
        WHOLE,
        WHOLE + b" \r",
        messages(ASK),
        messages('{"c\\u006fntent":"a","role":"user"}'),
        messages('{"role":"assistant","content":"say \\"it\\" \\\\"}'),
        messages('{"role":"assistant","content":"","reasoning_content":""}'),
        b'{"messages":[' + ASK.encode() + b'],"tools":null,"id":"a","metadata":{"x":[1,2.5]}}',
    ],
)
def test_an_ordinary_line_is_read_the_fast_way(line: bytes) -> None:
    assert read_line(line) is not None
    assert_same(line)


def test_the_fields_that_nothing_reads_are_named() -> None:
    read = read_line(WHOLE)

    assert read is not None
    assert read.unread == {"id", "messages[].refusal"}


def test_tools_that_stand_in_many_lines_are_the_same_in_all() -> None:
    first, second = read_line(WHOLE), read_line(WHOLE.replace(b"Ann", b"Ben"))

    assert first is not None
    assert second is not None
    assert first.conversation.tools == second.conversation.tools
    assert Conversation.from_json(first.conversation.to_json()) == first.conversation


def test_every_line_of_the_example_dataset_is_read_the_fast_way() -> None:
    lines = (TEMPLATES / "data" / "tidemark-support.jsonl").read_bytes().splitlines()

    for line in lines:
        assert read_line(line) is not None
        assert_same(line)
