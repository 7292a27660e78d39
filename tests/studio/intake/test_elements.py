"""An array is read element by element, and damage costs the element that it is in."""

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.domain.validation import Issue
from studio.intake import elements
from studio.intake.elements import MAX_RECORD_BYTES, Element, split_array, split_values

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CUT_OFF = "the file seems to be cut off: upload it again"


def split(content: bytes, is_array: bool = True) -> list[Any]:
    """Return line, column and text of each element, and the sentence of each Issue."""
    reader = split_array if is_array else split_values
    return [
        (found.line, found.column, found.raw.decode()) if isinstance(found, Element) else str(found)
        for found in reader(io.BytesIO(content))
    ]


@given(
    st.lists(JSON_VALUES, max_size=6),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.sampled_from([1, 2, 7, 2**20]),
)
def test_the_elements_of_an_array_are_those_that_json_finds(
    values: list[Any], indent: int | None, is_ascii: bool, chunk_bytes: int
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=is_ascii)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elements, "CHUNK_BYTES", chunk_bytes)
        found = split(f"\ufeff {text} \n".encode())
    assert [json.loads(element[2]) for element in found] == values
    lines = f" {text} \n".split("\n")
    for line, column, raw in found:
        assert lines[line - 1][column - 1 :].startswith(raw.split("\n")[0])


@given(st.lists(st.dictionaries(st.text(), JSON_VALUES), max_size=6), st.sampled_from([None, 1]))
def test_values_in_a_row_are_those_that_json_finds(
    values: list[dict[str, Any]], indent: int | None
) -> None:
    text = "\n".join(json.dumps(value, indent=indent) for value in values)
    found = split(text.encode(), is_array=False)
    assert [json.loads(element[2]) for element in found] == values


DAMAGED: dict[str, tuple[bytes, list[Any]]] = {
    "empty": (b"[ \n ]", []),
    "comma behind": (
        b"[1,\n]",
        [(1, 2, "1"), "line 2: not JSON: a comma without a record beside it"],
    ),
    "comma before": (
        b"[,1]",
        ["line 1: not JSON: a comma without a record beside it", (1, 3, "1")],
    ),
    "not closed": (
        b"[1,\n2",
        [(1, 2, "1"), (2, 1, "2"), f"line 2: the array is not closed by a ]; {CUT_OFF}"],
    ),
    "cut in an object": (
        b'[{"a":1},\n{"a":',
        [
            (1, 2, '{"a":1}'),
            f"line 2: the record that begins here is not closed; {CUT_OFF}",
        ],
    ),
    "cut in a text": (
        b'[1, "a',
        [(1, 2, "1"), f"line 1: the record that begins here is not closed; {CUT_OFF}"],
    ),
    "cut behind a backslash": (
        b'["a\\',
        [f"line 1: the record that begins here is not closed; {CUT_OFF}"],
    ),
    "something behind": (
        b"[1]\n\n [2]",
        [(1, 2, "1"), "line 3: not JSON: something follows the ] that closes the array"],
    ),
    "text not closed in its line": (
        b'[{"a":"x\n},\n{"b":2}]',
        [(1, 2, '{"a":"x\n}'), (3, 1, '{"b":2}')],
    ),
    "line feed behind a backslash": (b'["a\\\n, 1]', [(1, 2, '"a\\'), (2, 3, "1")]),
    "bracket too many": (b"[{}}, 1]", [(1, 2, "{}}"), (1, 7, "1")]),
    "no comma": (b"[{} {}, 1]", [(1, 2, "{} {}"), (1, 9, "1")]),
    "other quotes": (b"[{'a': 1}, 1]", [(1, 2, "{'a': 1}"), (1, 12, "1")]),
    "only the opening": (b"[", [f"line 1: the array is not closed by a ]; {CUT_OFF}"]),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_damage_costs_the_element_that_it_is_in(
    name: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elements, "CHUNK_BYTES", chunk_bytes)
    content, found = DAMAGED[name]
    assert split(content) == found


def test_damage_among_values_in_a_row_is_found() -> None:
    found = split(b'x {"a": 1}\n{"b":', is_array=False)
    sentence = f"line 2: the record that begins here is not closed; {CUT_OFF}"
    assert found == [(1, 1, 'x {"a": 1}'), sentence]


class Endless(io.RawIOBase):
    """An array of one record after the other, of which one has gigabytes."""

    def __init__(self, num_megabytes: int, filler: bytes) -> None:
        super().__init__()
        self._pieces = iter([b'[1,\n"', *[filler * 2**20] * num_megabytes, b'",\n2]'])

    def read(self, _: int = -1) -> bytes:
        """Return the next piece, of whatever size."""
        return next(self._pieces, b"")


@pytest.mark.parametrize("filler", [b"x", b"\\", b","])
def test_an_element_over_the_limit_is_left_out_in_flat_memory(filler: bytes) -> None:
    tracemalloc.start()
    found = list(split_array(Endless(200, filler)))  # type: ignore[arg-type]  # all it uses is there
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found[1], Issue)
    assert str(found[1]) == "line 2: the record is longer than 16 MiB"
    assert [one.raw for one in found if isinstance(one, Element)] == [b"1", b"2"]
    assert peak_bytes < 4 * MAX_RECORD_BYTES


def test_many_elements_need_the_memory_of_one() -> None:
    elements_of_a_kilobyte = b',{"a":"' + b"b" * 1000 + b'"}'
    content = b"[1" + elements_of_a_kilobyte * 15_000 + b"]"
    tracemalloc.start()
    num_elements = sum(isinstance(one, Element) for one in split_array(io.BytesIO(content)))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_elements == 15_001
    assert peak_bytes < 8 * 2**20


def test_an_element_at_the_limit_is_whole() -> None:
    longest = b'"' + b"x" * (MAX_RECORD_BYTES - 2) + b'"'
    assert [len(one[2]) for one in split(b"[" + longest + b"]")] == [MAX_RECORD_BYTES]
    assert split(b"[" + longest[:-1] + b'x"]') == ["line 1: the record is longer than 16 MiB"]
