"""Read the records of a content, whatever its layout, each with the line where it begins.

JSON lines are not read here: the Reader has a faster way for them.
"""

import codecs
import json
from collections.abc import Iterator

from studio.domain.strict_json import RecordError, json_sentence, parse_json
from studio.domain.validation import Issue, short
from studio.intake.archive import Part
from studio.intake.elements import MAX_RECORD_BYTES, Element, split_array, split_values
from studio.intake.formats import Mapping
from studio.intake.layout import Layout
from studio.intake.parquet import read_parquet
from studio.intake.table import read_table


def read_values(
    part: Part, layout: Layout, mapping: Mapping | None = None
) -> Iterator[tuple[int, object] | Issue]:
    """Yield each record as the values that stand there, or an Issue where none can be read.

    Memory stays flat: one record, or a small batch of them, is held at a time.

    Args:
        part: The content.
        layout: How its records stand in it, as `sniff` said; all but JSON_LINES.
        mapping: Columns that somebody chose; they are read beside those of known names.

    Yields:
        Line from 1 (Parquet: number of the row) with the value, or an Issue.

    Raises:
        InputError: The content as a whole cannot be read; while it is read.
        UnknownFormatError: A table has no column of a known name.
    """
    if layout is Layout.JSON_LINES:
        raise ValueError("JSON lines are read by the Reader")
    match layout:
        case Layout.PARQUET:
            yield from read_parquet(part, mapping)
        case Layout.CSV:
            yield from read_table(part)
        case Layout.TEXT:
            yield from _read_text(part)
        case _:
            for element in read_elements(part, layout):
                yield parse_element(element) if isinstance(element, Element) else element


def read_elements(part: Part, layout: Layout) -> Iterator[Element | Issue]:
    """Yield the bytes of each record of a JSON array, or of JSON values in a row, unparsed."""
    return split_array(part.stream) if layout is Layout.JSON_ARRAY else split_values(part.stream)


def parse_element(element: Element) -> tuple[int, object] | Issue:
    """Return line and value of a record, or the Issue that says why it is no JSON."""
    try:
        return element.line, parse_json(element.raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = element.line + element.raw.count(b"\n", 0, error.start)
        reason = f"byte {error.start + 1} of the record is not UTF-8"
        return Issue(line=line, kind="encoding", reason=reason, value=hex(element.raw[error.start]))
    except json.JSONDecodeError as error:
        column = error.colno + (element.column - 1 if error.lineno == 1 else 0)
        what = json_sentence(error).rpartition(" at column ")[0]
        where = f"line {element.line + error.lineno - 1}, column {column}"
        value = short(error.doc[max(0, error.pos - 20) : error.pos + 20].strip())
        return Issue(line=element.line, kind="json", value=value, reason=f"{what} at {where}")
    except RecordError as error:
        path, value = short(error.path), short(error.value)
        return Issue(line=element.line, kind="json", path=path, value=value, reason=error.reason)


def _read_text(part: Part) -> Iterator[tuple[int, object] | Issue]:
    """Yield the whole content as one document."""
    raw = part.stream.read(MAX_RECORD_BYTES + 1)
    if len(raw) > MAX_RECORD_BYTES:
        reason = "the text is longer than 16 MiB; cut it into several files and zip them"
        yield Issue(line=0, kind="too_long", reason=reason)
        return
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        yield 1, {"text": raw.decode("utf-8")}
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        reason = f"byte {error.start + 1} of the text is not UTF-8; save it as UTF-8"
        yield Issue(line=line, kind="encoding", reason=reason, value=hex(raw[error.start]))
