"""A content is told by its first bytes; what is not read is named, with what to do."""

import codecs
import csv
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather, orc, parquet

from studio.errors import InputError
from studio.intake.layout import HEAD_BYTES, Layout, delimiter, sniff

RECORD = json.dumps({"messages": [{"role": "user", "content": "a, b"}]}).encode()
PRETTY = json.dumps(json.loads(RECORD), indent=2).encode()

KNOWN: dict[str, tuple[bytes, Layout]] = {
    "empty": (b"", Layout.JSON_LINES),
    "blank": (b" \n\n\t", Layout.JSON_LINES),
    "only a byte order mark": (codecs.BOM_UTF8, Layout.JSON_LINES),
    "one record": (RECORD, Layout.JSON_LINES),
    "lines": (RECORD + b"\r\n\r\n" + RECORD + b"\n", Layout.JSON_LINES),
    "lines behind a mark": (codecs.BOM_UTF8 + RECORD + b"\n", Layout.JSON_LINES),
    "a bad first line": (b'"messages": []}\n' + RECORD + b"\n" + RECORD, Layout.JSON_LINES),
    "a NUL in a line": (RECORD + b"\n{\0}\n", Layout.JSON_LINES),
    "a first line longer than the head": (b'{"a": "' + b"x" * HEAD_BYTES, Layout.JSON_LINES),
    "values that are no objects": (b"null\n12\ntrue\n", Layout.JSON_LINES),
    "texts and lists": (b'null\n"x"\n[]\n', Layout.JSON_LINES),
    "one column of quoted text": (b'"text"\n"Once"\n"upon"\n', Layout.CSV),
    "a list a line": (b"[1]\n[2]\n", Layout.JSON_LINES),
    "array": (b"[" + RECORD + b"]", Layout.JSON_ARRAY),
    "empty array": (b"[]\n", Layout.JSON_ARRAY),
    "array behind a mark": (codecs.BOM_UTF8 + b"\n [1]", Layout.JSON_ARRAY),
    "pretty array": (b"[\n" + PRETTY + b"\n]", Layout.JSON_ARRAY),
    "array with brackets at line ends": (b'[{"a":[1]\n},[2]]', Layout.JSON_ARRAY),
    "pretty object": (PRETTY, Layout.JSON_VALUES),
    "pretty objects": (PRETTY + b"\n" + PRETTY, Layout.JSON_VALUES),
    "object broken behind a comma": (b'{"a": 1,\n"b": 2}', Layout.JSON_VALUES),
    "parquet": (b"PAR1...", Layout.PARQUET),
    "commas": (b"question,answer\nWhy?,So.\n", Layout.CSV),
    "tabs": (b"question\tanswer\nWhy?\tSo.\n", Layout.CSV),
    "semicolons": (b"id;question;answer\n1;Why, oh why?;So.\n", Layout.CSV),
    "pipes": (b"a|b\n1|2\n", Layout.CSV),
    "pandas index": (b",question,answer\n0,Why?,So.\n", Layout.CSV),
    "quoted line feeds": (b'a,b\n"1\n\n1",2\n"x, y",3', Layout.CSV),
    "many rows": (b"a,b\n" + b"1,2\n" * 30, Layout.CSV),
    "only names": (b"question,answer\n", Layout.CSV),
    "one column of text": (b"text\nOnce upon a time\nthere was\n", Layout.CSV),
    "one row has a column more": (b"a,b\n1,2\n1,2,3\n4,5\n", Layout.CSV),
    "table in Latin-1": ("a,b\né,2\n".encode("latin-1"), Layout.CSV),
    "table behind a mark": (codecs.BOM_UTF8 + b"a,b\n1,2\n", Layout.CSV),
    "quoted names of any letters": (b'"<img x>",b\n1,2\n', Layout.CSV),
    "open quote": (b'Prompt,completion\n"1,2\n', Layout.CSV),
}
TEXTS = {
    "prose": b"Once upon a time, there was\na king, who had, as kings do, a crown.\n",
    "prose on one line": b"Hello, world\n",
    "speech": b'"Hello," he said.\n"Well," she said, "so be it."\n',
    "markdown": b"# Title\n\n* one\n* two\n",
    "a line named text": b"text\n",
    "text with a form feed": b"one\x0c\x1b[1mtwo",
    "passwords": b"root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n",
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_layout_is_told(name: str) -> None:
    content, layout = KNOWN[name]
    assert sniff(content) is layout
    assert layout.title


@pytest.mark.parametrize("name", TEXTS)
def test_only_a_name_makes_a_content_a_text(name: str) -> None:
    for ending in ("txt", "md", "text", "rst", "TXT", "txt.gz"):
        assert sniff(TEXTS[name], f"a.{ending}") is Layout.TEXT
    for other in ("", "shadow", "txt", "a.log", "a.json", "a.parquet", "a.txt.bak"):
        with pytest.raises(InputError) as caught:
            sniff(TEXTS[name], other)
        assert caught.value.message == (
            "The file is neither JSON, nor a table (CSV, TSV), nor Parquet."
        )
        assert "continued pre-training, rename it to end with .txt" in (caught.value.hint or "")


@pytest.mark.parametrize("name", TEXTS)
def test_a_name_of_lines_or_tables_is_believed(name: str) -> None:
    for ending in ("jsonl", "ndjson", "JSONL.gz"):
        assert sniff(TEXTS[name], f"a.{ending}") is Layout.JSON_LINES
    for ending in ("csv", "tsv"):
        assert sniff(TEXTS[name], f"a.{ending}") is Layout.CSV


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
def test_no_name_hides_what_the_content_is(ending: str) -> None:
    assert sniff(RECORD, f"a.{ending}") is Layout.JSON_LINES
    assert sniff(b"[" + RECORD + b"]", f"a.{ending}") is Layout.JSON_ARRAY
    assert sniff(b"PAR1...", f"a.{ending}") is Layout.PARQUET
    with pytest.raises(InputError, match="The file is a PDF"):
        sniff(b"%PDF-1.7", f"a.{ending}")


@given(st.lists(st.dictionaries(st.text(), st.text()), min_size=1, max_size=5), st.booleans())
def test_json_is_told_however_it_is_written(records: list[dict[str, str]], is_pretty: bool) -> None:
    array = json.dumps(records, indent=2 if is_pretty else None)
    assert sniff(array.encode()) is Layout.JSON_ARRAY
    assert sniff("\n".join(map(json.dumps, records)).encode()) is Layout.JSON_LINES


@given(
    st.sampled_from(",\t;|"),
    st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=9),
)
def test_a_table_is_told_whatever_its_cells_hold(mark: str, rows: list[tuple[str, str]]) -> None:
    table = io.StringIO()
    csv.writer(table, delimiter=mark, quoting=csv.QUOTE_ALL).writerows(
        [("question", "answer"), *rows]
    )
    assert delimiter(table.getvalue(), is_whole=True) == mark


def test_a_row_that_the_head_cuts_is_not_counted() -> None:
    rows = b"a,b\n" + b'"1","2"\n' + b'"' + b"x" * HEAD_BYTES
    assert sniff(rows) is Layout.CSV
    assert sniff(b"a,b\n" + b"x" * HEAD_BYTES) is Layout.CSV
    assert sniff(b"Hello, you\n" + b"x" * HEAD_BYTES, "a.txt") is Layout.TEXT


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"), io.BytesIO(b""))
    return buffer.getvalue()


def numpy_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def arrow(how: str) -> bytes:
    buffer, table = io.BytesIO(), pa.table({"a": [1]})
    if how == "feather":
        feather.write_feather(table, buffer)
    elif how == "orc":
        orc.write_table(table, buffer)
    else:
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
    return buffer.getvalue()


LINES = (RECORD + b"\n").decode()
FOREIGN: dict[str, tuple[bytes, str]] = {
    "UTF-16": (LINES.encode("utf-16"), "The text is encoded as UTF-16 (it begins with FF FE)."),
    "UTF-16 BE": (
        codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
        "The text is encoded as UTF-16 (it begins with FE FF).",
    ),
    "UTF-32": (
        LINES.encode("utf-32"),
        "The text is encoded as UTF-32 (it begins with FF FE 00 00).",
    ),
    "UTF-32 BE": (
        codecs.BOM_UTF32_BE + LINES.encode("utf-32-be"),
        "The text is encoded as UTF-32 (it begins with 00 00 FE FF).",
    ),
    "bare UTF-16": (LINES.encode("utf-16-le"), "The text is encoded as UTF-16."),
    "bare UTF-16 BE": (LINES.encode("utf-16-be"), "The text is encoded as UTF-16."),
    "bare UTF-32": (LINES.encode("utf-32-le"), "The text is encoded as UTF-32."),
    "bare UTF-32 BE": (LINES.encode("utf-32-be"), "The text is encoded as UTF-32."),
    "tar": (tar(), "The file is a tar archive."),
    "gzip": (gzip.compress(b"x"), "The file is a gzip inside another archive."),
    "xz": (lzma.compress(b"x"), "The file is an xz archive."),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "The file is a 7z archive."),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "The file is a PDF."),
    "rtf": (b"{\\rtf1\\ansi", "The file is a rich text document (RTF)."),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1", "The file is a document of an old Office (xls, doc)."),
    "numpy": (numpy_array(), "The file is a NumPy array."),
    "pickle": (pickle.dumps({"a": 1}), "The file is a Python pickle."),
    "feather": (arrow("feather"), "The file is an Arrow file (Feather)."),
    "arrow stream": (arrow("stream"), "The file is an Arrow stream."),
    "orc": (arrow("orc"), "The file is an ORC file."),
    "encrypted parquet": (b"PARE", "The file is an encrypted Parquet file."),
    "png": (b"\x89PNG\r\n\x1a\n", "The file is a picture (PNG)."),
    "webp": (b"RIFF\x10\0\0\0WEBPVP8", "The file is a picture (WebP)."),
    "safetensors": (b"\x40\0\0\0\0\0\0\0{}", "The file is a model in safetensors."),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        "The file is a pointer of Git LFS, not the file itself.",
    ),
    "web page": (
        b"\n<!DOCTYPE html>\n<html>",
        "The file is a web page (HTML or XML), perhaps the error page of a download.",
    ),
    "binary": (bytes(range(9, 256)) * 9, "The file is binary, of a kind not known here."),
    "old line ends": (
        RECORD + b"\r" + RECORD,
        "The file has no line feeds: its lines end with a carriage return only.",
    ),
    "old line ends in a table": (
        b"a,b\r1,2\r",
        "The file has no line feeds: its lines end with a carriage return only.",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_read_is_named(name: str) -> None:
    content, sentence = FOREIGN[name]
    with pytest.raises(InputError) as caught:
        sniff(content)
    assert caught.value.message == sentence
    assert caught.value.hint


def test_a_database_is_named(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("create table a (b)")
    database.close()
    with pytest.raises(InputError, match="The file is a SQLite database"):
        sniff((tmp_path / "a.db").read_bytes())


def test_a_real_parquet_file_is_told() -> None:
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"a": [1]}), buffer)
    assert sniff(buffer.getvalue()) is Layout.PARQUET
