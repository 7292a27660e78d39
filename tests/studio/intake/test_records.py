"""Records of every layout, each with the line where it begins; a bad one costs itself alone."""

import csv
import gzip
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from studio.domain.validation import Issue
from studio.errors import InputError
from studio.intake import elements, table
from studio.intake import parquet as parquet_reader
from studio.intake.archive import Limits, Part, open_parts
from studio.intake.formats import Mapping, UnknownFormatError
from studio.intake.layout import HEAD_BYTES, Layout, sniff
from studio.intake.records import read_values


def part_of(content: bytes, name: str = "") -> Part:
    stream = io.BufferedReader(io.BytesIO(content), 2**20)
    return Part(
        name="",
        stream=stream,
        size=len(content),
        file=stream,
        spend=lambda _: None,
        file_name=name,
    )


def read(content: bytes, mapping: Mapping | None = None, name: str = "") -> list[Any]:
    """Return line and value of each record, and the sentence of each Issue."""
    found = read_values(part_of(content, name), sniff(content[:HEAD_BYTES], name), mapping)
    return [str(one) if isinstance(one, Issue) else one for one in found]


def refusal(content: bytes, mapping: Mapping | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read(content, mapping)
    assert caught.value.hint
    return caught.value.message


# ---- JSON -------------------------------------------------------------------------------------


def test_records_of_an_array_have_the_lines_where_they_begin() -> None:
    assert read(b'[\n {"a": 1},\n {\n"a": [2]}\n]') == [(2, {"a": 1}), (3, {"a": [2]})]


def test_objects_over_several_lines_are_read_one_after_the_other() -> None:
    assert read(b'{\n"a": 1\n}\n\n{\n"a": 2}') == [(1, {"a": 1}), (5, {"a": 2})]


BAD_ELEMENTS = {
    "key twice": ('{"a":1,"a":2}', "a: the key stands twice in one object"),
    "not a number": ('{"a":NaN}', "not JSON: NaN is not a JSON number"),
    "infinite": ('{"a":1e999}', "the number is too large (found 1e999)"),
    "half a pair": (
        '{"a":["\\ud800"]}',
        "a[0]: an unpaired surrogate stands for no character (found \\ud800)",
    ),
    "deep": ("[" * 200 + "]" * 200, "the record is nested more than 100 levels deep"),
    "deeper": ("[" * 99_999 + "]" * 99_999, "the record is nested more than 100 levels deep"),
    "digits": ("1" * 5000, "a number has 5000 digits; at most 4300 are read"),
    "quotes": (
        "{'a': 1}",
        "not JSON: expecting property name enclosed in double quotes at line 2, column 3 "
        "(found {'a': 1})",
    ),
    "over lines": (
        '{"a":\n\n  oops}',
        'not JSON: expecting value at line 4, column 3 (found {"a":\\n\\n  oops})',
    ),
}


@pytest.mark.parametrize("name", BAD_ELEMENTS)
def test_elements_are_read_as_strictly_as_lines(name: str) -> None:
    text, sentence = BAD_ELEMENTS[name]
    first, bad, last = read(f"[0,\n {text},\n1]".encode())
    # The text has its own lines between.
    assert (first, last[1]) == ((1, 0), 1)
    separator = ", " if sentence.startswith("a") and ":" in sentence.split()[0] else ": "
    assert bad == f"line 2{separator}{sentence}"


def test_a_byte_that_is_no_text_costs_its_record() -> None:
    sentence = "line 2: byte 8 of the record is not UTF-8 (found 0xe9)"
    assert read(b'[0,{\n"a":"\xe9"}, 1]') == [(1, 0), sentence, (2, 1)]


def test_json_lines_are_for_the_reader() -> None:
    with pytest.raises(ValueError, match="Reader"):
        next(read_values(part_of(b"{}\n"), Layout.JSON_LINES))


# ---- text -------------------------------------------------------------------------------------


def test_a_text_is_one_document() -> None:
    text = "Once upon a time,\r\n\r\nthere was é."
    assert read(("\ufeff" + text).encode(), name="a.txt") == [(1, {"text": text})]


def test_a_text_that_is_no_utf_8_is_refused_with_its_place() -> None:
    sentence = "line 2: byte 8 of the text is not UTF-8; save it as UTF-8 (found 0xe9)"
    assert read(b"# One\nd\xe9j\xe0\n", name="a.md") == [sentence]


def test_a_text_over_the_limit_is_refused() -> None:
    content = b"# One\n" + b"x" * elements.MAX_RECORD_BYTES
    assert read(content, name="a.txt") == [
        "the text is longer than 16 MiB; cut it into several files and zip them"
    ]


# ---- tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_names_of_columns_may_be_anything(mark: str) -> None:
    table = f'"<img x>"{mark}b\n1{mark}2\n'.encode()
    assert read(table) == [(2, {"<img x>": "1", "b": "2"})]
    assert read(table.replace(b'"', b""), name="a.CSV") == [(2, {"<img x>": "1", "b": "2"})]


def test_a_file_named_as_a_table_is_one_whatever_is_in_it() -> None:
    assert read(b"any words\nat all\n", name="a.csv") == [(2, {"any words": "at all"})]
    (bad,) = read(b"a\tb\n1\n", name="a.tsv")
    assert bad.startswith("line 2: the record has 1 columns, the first line has 2")


CONTROLS = "".join(map(chr, [*range(9), 11, *range(14, 32)]))
CELLS = st.text(st.characters(codec="utf-8", exclude_characters=CONTROLS), max_size=9)


@given(
    st.lists(st.tuples(CELLS, CELLS.filter(bool)), max_size=9),
    st.sampled_from(",\t;|"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\ufeff"]),
)
def test_a_table_is_read_as_it_was_written(
    rows: list[tuple[str, str]], mark: str, line_end: str, bom: str
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=mark, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([("question", "answer"), *rows])
    found = read((bom + text.getvalue()).encode())
    assert [value for _, value in found] == [{"question": a, "answer": b} for a, b in rows]
    physical = text.getvalue().split("\n")
    for (line, _), row in zip(found, rows, strict=True):
        assert row[0].split("\n")[0].replace('"', '""').rstrip("\r") in physical[line - 1]


def test_the_line_of_a_row_is_where_it_begins() -> None:
    content = b'Question,Answer\n"1\n2",x\n\n,\nb,y\n'
    assert read(content) == [
        (2, {"question": "1\n2", "answer": "x"}),
        (6, {"question": "b", "answer": "y"}),
    ]


def test_names_without_a_text_are_numbered() -> None:
    assert read(b",Ask,Reply\n0,a,b\n") == [(2, {"column 1": "0", "Ask": "a", "Reply": "b"})]


def test_a_row_of_another_length_is_a_finding() -> None:
    assert read(b"question,answer\na\nb,c\nd,e,f\n") == [
        "line 2: the record has 1 columns, the first line has 2 (found a)",
        (3, {"question": "b", "answer": "c"}),
        "line 4: the record has 3 columns, the first line has 2 (found d, e, f)",
    ]


def test_wrong_quotes_cost_their_row() -> None:
    assert read(b'question,answer\n"a" x,b\nc,d\n"e,f\n\n') == [
        "line 2: the quotes of this record are wrong: ',' expected after '\"'",
        (3, {"question": "c", "answer": "d"}),
        "line 4: a quote opens in this record and is never closed",
    ]


def test_a_byte_of_another_encoding_costs_its_row() -> None:
    sentence = (
        "line 2: byte 3 of a line of the record is not UTF-8; save the table as UTF-8 (found 0xe9)"
    )
    assert read(b"question,answer\na,\xe9\nb,c\n") == [
        sentence,
        (3, {"question": "b", "answer": "c"}),
    ]


def test_columns_of_one_name_and_bad_names_are_refused() -> None:
    twice = refusal(b"Answer,answer,question\n1,2,3\n")
    assert twice == "Two columns of the table are called answer."
    assert list(table.read_table(part_of(b""))) == []
    with pytest.raises(InputError, match="The line of column names cannot be read: a quote opens"):
        list(table.read_table(part_of(b'"a,b\n1,2\n')))


def test_a_row_that_never_ends_stops_in_flat_memory() -> None:
    content = b'question,answer\na,b\n"' + (b"x" * 999 + b"\n") * 17_000
    assert read(content) == [
        (2, {"question": "a", "answer": "b"}),
        "line 3: the record is longer than 16 MiB, perhaps as a quote is not closed; "
        "what follows was not read",
    ]


def test_a_long_cell_is_read() -> None:
    cell = "x" * 2**20
    assert read(f"question,answer\na,{cell}\n".encode()) == [(2, {"question": "a", "answer": cell})]


# ---- Parquet ----------------------------------------------------------------------------------


def parquet_of(rows: Any, schema: pa.Schema | None = None, **options: Any) -> bytes:
    content = io.BytesIO()
    rows = pa.Table.from_pylist(rows, schema) if isinstance(rows, list) else rows
    parquet.write_table(rows, content, **options)
    return content.getvalue()


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}}


def test_nulls_that_parquet_adds_to_structs_are_left_out() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [call("x", city="Rome"), call("y", days=1)]},
                {"role": "assistant", "tool_calls": []},
            ],
            "tools": None,
        },
        {"messages": None},
    ]
    note, *found = read(parquet_of(rows))
    assert found == [(1, rows[0]), (2, {"messages": rows[1]["messages"]}), (3, {})]
    assert note.startswith("Parquet gives each call the arguments of all calls; those that are")


def test_only_columns_that_a_format_reads_are_read() -> None:
    rows = [{"prompt": "a", "completion": "b", "id": 1, "embedding": [0.5] * 3}]
    assert read(parquet_of(rows)) == [(1, {"prompt": "a", "completion": "b"})]
    mapping = Mapping(user="id", assistant="prompt")
    assert read(parquet_of(rows), mapping) == [(1, {"id": 1, "prompt": "a", "completion": "b"})]


def test_values_of_every_type_become_json() -> None:
    schema = pa.schema(
        {
            "text": pa.dictionary(pa.int8(), pa.string()),
            "prompt": pa.binary(),
            "label": pa.bool_(),
            "question": pa.map_(pa.string(), pa.struct({"a": pa.int8(), "b": pa.int8()})),
            "answer": pa.list_(pa.float32(), 2),
            "input": pa.timestamp("s"),
            "output": pa.large_list(pa.large_string()),
        }
    )
    rows = [
        {
            "text": "t",
            "prompt": b"p",
            "label": True,
            "question": [("k", {"a": 1}), ("l", None)],
            "answer": [0.5, float("nan")],
            "input": 0,
            "output": ["x", None],
        },
        dict.fromkeys(schema.names),
        {"question": [("m", {"b": 2})], "output": []},
    ]
    assert read(parquet_of(rows, schema)) == [
        (
            1,
            {
                "text": "t",
                "prompt": "p",
                "label": True,
                "question": {"k": {"a": 1}},
                "answer": [0.5, None],
                "input": "1970-01-01 00:00:00",
                "output": ["x", None],
            },
        ),
        (2, {}),
        (3, {"question": {"m": {"b": 2}}, "output": []}),
    ]


def test_a_value_that_json_cannot_hold_costs_its_row() -> None:
    schema = pa.schema({"text": pa.binary(), "answer": pa.float64()})
    rows = [{"text": b"a"}, {"text": b"\xe9"}, {"answer": float("inf")}, {"text": b"b"}]
    assert read(parquet_of(rows, schema)) == [
        (1, {"text": "a"}),
        "line 2: a text of the row is not UTF-8 (found 0xe9)",
        "line 3: a number of the row is infinite, which JSON cannot hold",
        (4, {"text": "b"}),
    ]


def test_rows_are_counted_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_BATCH_ROWS", 3)
    rows = [{"text": str(number)} for number in range(10)]
    content = parquet_of(rows, row_group_size=4)
    assert read(content) == [(number + 1, row) for number, row in enumerate(rows)]
    assert read(parquet_of(rows[:0], pa.schema({"text": pa.string()}))) == []


def test_a_schema_that_no_format_has_is_refused_with_its_columns() -> None:
    content = parquet_of([{"a": "1", "b": [1]}])
    with pytest.raises(UnknownFormatError) as caught:
        read(content)
    assert caught.value.message == "The columns are a, b; their meaning is not known."
    assert caught.value.hint.startswith("Expected is a list `messages` (OpenAI) or")
    assert caught.value.columns == ("a", "b")
    missing = refusal(content, Mapping(user="a", assistant="c"))
    assert missing == "The columns are a, b; c is not among them."


def test_a_column_of_a_wrong_type_is_refused() -> None:
    sentence = "The column messages of the Parquet file is of type int64."
    assert refusal(parquet_of([{"messages": 1}])) == sentence


def test_a_schema_of_too_many_levels_is_refused() -> None:
    value: Any = 1
    for _ in range(101):
        value = {"a": value}
    sentence = "The Parquet file is damaged: its columns are nested more than 100 levels deep."
    assert refusal(parquet_of([{"messages": [value]}])) == sentence


def test_a_damaged_parquet_file_is_refused() -> None:
    content = parquet_of([{"text": "x" * 99 + str(number)} for number in range(2000)])
    assert refusal(content[:-100]) == "The Parquet file is damaged: its end is missing."
    assert refusal(b"PAR1").startswith("The Parquet file is damaged: Parquet file size is 4 bytes")
    pages = content[:4] + bytes(4000) + content[4004:]
    assert refusal(pages).startswith("The Parquet file is damaged: ")


def test_a_parquet_file_in_an_archive_is_read_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = parquet_of([{"text": "a"}])
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("a.parquet", content)

    def values(name: str) -> list[Any]:
        (part,) = (
            list(read_values(part, Layout.PARQUET))
            for part in open_parts(tmp_path / name, limits=Limits())
        )
        return part

    assert values("a.gz") == values("a.zip") == [(1, {"text": "a"})]
    monkeypatch.setattr(parquet_reader, "MAX_PACKED_BYTES", 100)
    with pytest.raises(InputError, match="A Parquet file of more than 64 MiB is packed"):
        values("a.gz")


def test_a_row_over_the_limit_is_left_out() -> None:
    rows = [{"text": "a"}, {"text": "x" * 17 * 2**20}, {"text": "b"}]
    found = read(parquet_of(rows))
    assert found == [(1, rows[0]), "line 2: the record is longer than 16 MiB", (3, rows[2])]


def test_a_parquet_bomb_stops_at_the_limit_in_flat_memory(tmp_path: Path) -> None:
    """One text of 8 MiB, stored once, stands in 3,000 rows: 24 GiB from a file of kilobytes."""
    path = tmp_path / "a.parquet"
    text = pa.array(["x" * 8 * 2**20]).dictionary_encode()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 3_000, pa.int32()), text.dictionary)
    parquet.write_table(
        pa.table({"text": column}),
        path,
        dictionary_pagesize_limit=2**30,
        store_schema=False,
        compression="zstd",
    )
    assert path.stat().st_size < 2**20
    with pytest.raises(subprocess.CalledProcessError) as caught:
        memory_of(path, Layout.PARQUET)
    sentence = "The file unpacks to more than 500 times its size, as no real data does."
    assert sentence in caught.value.stderr


MEASURE = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
from studio.intake.archive import Limits, open_parts
from studio.intake.layout import Layout
from studio.intake.records import read_values
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for part in open_parts(Path(sys.argv[1]), limits=Limits()):
    num_records = sum(1 for _ in read_values(part, Layout(sys.argv[2])))
print(num_records, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def memory_of(path: Path, layout: Layout) -> tuple[int, int]:
    """Return number of records, and KiB that reading needed."""
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), layout.value],
        capture_output=True,
        text=True,
        check=True,
    )
    num_records, kib = answer.stdout.split()
    return int(num_records), int(kib)


def test_a_row_group_of_any_size_is_read_in_flat_memory(tmp_path: Path) -> None:
    text = pa.array([f"{number} " * 300 for number in range(100_000)])
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pa.table({"text": text, "unused": text}), path, compression="none", use_dictionary=False
    )
    assert path.stat().st_size > 200 * 2**20
    num_records, kib = memory_of(path, Layout.PARQUET)
    assert num_records == 100_000
    assert kib < 64 * 2**10


def test_an_array_of_any_size_is_read_in_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    record = json.dumps({"text": "x" * 10_000})
    path.write_text("[" + ",".join([record] * 10_000) + "]", encoding="utf-8")
    num_records, kib = memory_of(path, Layout.JSON_ARRAY)
    assert num_records == 10_000
    assert kib < 32 * 2**10
