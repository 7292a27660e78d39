"""Read a table of text, CSV or TSV, record by record."""

import codecs
import csv
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from studio.domain.validation import Issue, short
from studio.errors import InputError
from studio.intake.archive import Part
from studio.intake.elements import MAX_RECORD_BYTES
from studio.intake.formats import KNOWN_FIELDS
from studio.intake.layout import HEAD_BYTES, delimiter
from studio.intake.names import TABLES, suffix_of


class _TooLongError(Exception):
    """A record grew beyond the limit while the csv module was collecting its lines."""


class _Lines:
    """The lines of a stream as text, counted; the bytes of one record are limited.

    The csv module asks for lines until a record is complete, and a quote that is never closed
    would make it read to the end of the file.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.num_lines = 0
        self._begin()

    def begin_record(self) -> int:
        """Forget the record before; return the line where the next one begins."""
        self._begin()
        return self.num_lines + 1

    def _begin(self) -> None:
        self._record_bytes = 0
        self.bad_byte: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[str]:
        while raw := self._stream.readline(MAX_RECORD_BYTES + 1):
            self.num_lines += 1
            if self.num_lines == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            self._record_bytes += len(raw)
            if self._record_bytes > MAX_RECORD_BYTES:
                raise _TooLongError
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                self.bad_byte = (error.start + 1, raw[error.start])
                yield raw.decode("utf-8", errors="replace")


def read_table(part: Part) -> Iterator[tuple[int, object] | Issue]:
    """Yield the line where each record begins, and its cells by the names of the columns.

    Args:
        part: A content with a line of names, then records; the delimiter is found out.

    Raises:
        InputError: The names are missing or not different.
    """
    lines = _Lines(part.stream)
    rows = _rows(lines, _delimiter(part))
    header = next(rows, None)
    if header is None:
        return
    if isinstance(header, Issue):
        raise InputError(f"The line of column names cannot be read: {header.reason}.", "Mend it.")
    names = _names(header[1])
    for row in rows:
        if isinstance(row, Issue):
            yield row
            continue
        line, cells = row
        if len(cells) == len(names):
            yield line, dict(zip(names, cells, strict=True))
        else:
            reason = f"the record has {len(cells)} columns, the first line has {len(names)}"
            yield Issue(line=line, kind="columns", value=short(", ".join(cells)), reason=reason)


def _delimiter(part: Part) -> str:
    head: bytes = part.stream.peek(HEAD_BYTES)[:HEAD_BYTES]  # type: ignore[attr-defined]  # all of open_parts have it
    text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="replace")
    suffix = suffix_of(part.file_name)
    found = delimiter(text, len(head) < HEAD_BYTES, is_table=suffix in TABLES)
    return found or ("\t" if suffix == ".tsv" else ",")


def _rows(lines: _Lines, mark: str) -> Iterator[tuple[int, list[str]] | Issue]:
    """Yield the line where each record begins with its cells; empty records are left out."""
    # The module's own limit is for the whole process and 128 KiB at first; ours is in _Lines.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES + 1))
    reader = csv.reader(iter(lines), delimiter=mark, strict=True)
    while True:
        line = lines.begin_record()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _bad_quotes(line, str(error))
            continue
        except _TooLongError:
            reason = (
                "the record is longer than 16 MiB, perhaps as a quote is not closed; "
                "what follows was not read"
            )
            yield Issue(line=line, kind="too_long", reason=reason)
            return
        if lines.bad_byte is not None:
            byte, value = lines.bad_byte
            reason = f"byte {byte} of a line of the record is not UTF-8; save the table as UTF-8"
            yield Issue(line=line, kind="encoding", value=hex(value), reason=reason)
        elif any(cells):
            yield line, cells


def _bad_quotes(line: int, message: str) -> Issue:
    if message == "unexpected end of data":
        reason = "a quote opens in this record and is never closed"
    else:
        reason = f"the quotes of this record are wrong: {message}"
    return Issue(line=line, kind="quotes", reason=reason)


def _names(header: list[str]) -> list[str]:
    names = [name.strip() or f"column {number}" for number, name in enumerate(header, start=1)]
    # `Prompt` and `prompt` are one name in a table that people wrote.
    names = [name.lower() if name.lower() in KNOWN_FIELDS else name for name in names]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"Two columns of the table are called {short(name)}.", "Give each its own name."
        )
    return names
