"""Read one part of a file as records: find out what it is, take the fastest way, judge each record."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice

import msgspec

from studio.domain.conversation import Kind, Record
from studio.domain.strict_json import RecordError, json_sentence, parse_json
from studio.domain.validation import Issue, check_control_characters, check_record, short
from studio.intake.archive import Part
from studio.intake.convert import convert
from studio.intake.elements import Element
from studio.intake.fast import read_line
from studio.intake.findings import Findings
from studio.intake.formats import PICTURES, PREFERRED, Format, recognise
from studio.intake.formats import Mapping as Columns
from studio.intake.layout import HEAD_BYTES, Layout, sniff
from studio.intake.lines import Block, holds_controls, read_blocks
from studio.intake.records import parse_element, read_elements, read_values
from studio.intake.unread import unread_fields

# How many records the format is recognised by.
NUM_SAMPLES = 20
# What msgspec says of a text that is the beginning of JSON.
_TRUNCATED = "Input data was truncated"
# Fields that OpenAI's format does not have, beside which a record is none or needs more reading.
_DECISIVE = frozenset((*PICTURES, *PREFERRED, "chosen", "rejected"))
# Short codes by the end of the path.
_KINDS = (
    (".role", "role"),
    (".content", "content"),
    (".arguments", "tool_arguments"),
    (".weight", "weight"),
)


class PartReader:
    """Reads the records of one part.

    Args:
        part: The part.
        findings: Where good and bad records are counted.
        columns: What the columns of a table mean, where somebody said so.

    Attributes:
        kind: What the records are; None before one was read.
    """

    def __init__(self, part: Part, findings: Findings, columns: Columns | None) -> None:
        self._part = part
        self._findings = findings
        self._columns = columns
        head = part.stream.peek(HEAD_BYTES)  # type: ignore[attr-defined]  # all parts are buffered
        self._layout = sniff(head[:HEAD_BYTES], part.file_name)
        self._format: Format | None = None
        self.kind: Kind | None = None

    @property
    def title(self) -> str:
        """Format and layout, for people; empty before a record was read."""
        return f"{self._format.title}, {self._layout.title}" if self._format else ""

    def read(self, progress: Callable[[], None]) -> Iterator[Record]:
        """Yield each good record; what is wrong with the others goes to the findings.

        Args:
            progress: Called now and then.

        Raises:
            InputError: The part as a whole cannot be read, or its format is not known.
        """
        if self._layout is Layout.JSON_LINES:
            yield from self._read_lines(progress)
        elif self._layout in (Layout.JSON_ARRAY, Layout.JSON_VALUES):
            yield from self._read_elements(progress)
        else:
            yield from self._read_values(progress)

    # ---- three ways to records ----------------------------------------------------------------

    def _read_lines(self, progress: Callable[[], None]) -> Iterator[Record]:
        blocks = read_blocks(self._part.stream)
        first = next(blocks, None)
        if first is None:
            return
        samples = (value for line in first.lines for value in _try_json(line))
        self._recognise(list(islice(samples, NUM_SAMPLES)))
        if first.has_mark:
            reason = "a byte order mark was removed"
            self._add(Issue(line=1, kind="encoding", reason=reason, severity="note"))
        for block in chain([first], blocks):
            yield from self._read_block(block)
            progress()

    def _read_block(self, block: Block) -> Iterator[Record]:
        lines, number = block.lines, block.first - 1
        if block.is_too_long:
            reason = "the line is longer than 16 MiB"
            self._reject(Issue(line=block.first, kind="too_long", reason=reason), lines[0])
            self._findings.count_lines(1, 0)
            return
        num_blank = 0
        for line in lines:
            number += 1
            if not line or line.isspace():
                num_blank += 1
                continue
            record = self._read_fast(line)
            if record is None:
                is_cut = block.is_cut and number == block.first + len(lines) - 1
                record = self._read_line(number, line, is_cut=is_cut)
            has_controls = block.may_hold_controls and holds_controls(line)
            if record is not None and self._is_good(number, record, line, has_controls):
                yield record
        self._findings.count_lines(len(lines), num_blank)

    def _read_elements(self, progress: Callable[[], None]) -> Iterator[Record]:
        elements = read_elements(self._part, self._layout)
        first = list(islice(elements, NUM_SAMPLES))
        raws = [element.raw for element in first if isinstance(element, Element)]
        self._recognise([value for raw in raws for value in _try_json(raw)])
        for element in chain(first, elements):
            if isinstance(element, Issue):
                self._reject(element, b"")
                continue
            record = self._read_fast(element.raw)
            if record is None:
                parsed = parse_element(element)
                if isinstance(parsed, Issue):
                    self._reject(parsed, element.raw)
                    continue
                record = self._convert(element.line, parsed[1], element.raw)
            has_controls = holds_controls(element.raw)
            self._findings.count_lines(1, 0)
            if record is not None and self._is_good(
                element.line, record, element.raw, has_controls
            ):
                yield record
            progress()

    def _read_values(self, progress: Callable[[], None]) -> Iterator[Record]:
        values = read_values(self._part, self._layout, self._columns)
        first = list(islice(values, NUM_SAMPLES))
        self._recognise([value[1] for value in first if not isinstance(value, Issue)])
        for found in chain(first, values):
            self._findings.count_lines(1, 0)
            if isinstance(found, Issue):
                self._reject(found, b"")
                continue
            line, value = found
            record = self._convert(line, value, value)
            if record is not None and self._is_good(line, record, value, True):
                yield record
            progress()

    def _recognise(self, samples: Sequence[object]) -> None:
        self._format = self._format_of(samples)
        self.kind = self._format.kind
        if self._format is Format.COLUMNS and self._columns is not None:
            self.kind = self._columns.kind

    def _format_of(self, samples: Sequence[object]) -> Format:
        columns = set(self._columns.columns) if self._columns else set()
        if not samples:
            # Nothing in it can be read; the sentences of this format say why, line by line.
            return Format.OPENAI
        if columns and any(isinstance(value, dict) and columns <= set(value) for value in samples):
            return Format.COLUMNS
        return recognise(samples)

    # ---- one record ---------------------------------------------------------------------------

    def _read_fast(self, raw: bytes) -> Record | None:
        """Return a record of OpenAI messages; None where only the strict way can tell."""
        if self._format is not Format.OPENAI:
            return None
        read = read_line(raw)
        if read is None:
            return None
        if read.unread:
            if not read.unread.isdisjoint(_DECISIVE):
                return None
            self._findings.pass_over(read.unread)
        return read.conversation

    def _read_line(self, number: int, line: bytes, *, is_cut: bool) -> Record | None:
        """Read a line strictly; one that cannot be read is rejected."""
        try:
            value = parse_json(line.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError as error:
            reason = f"byte {error.start + 1} of the line is not UTF-8"
            found = hex(line[error.start])
            issue = Issue(line=number, kind="encoding", reason=reason, value=found)
            if is_cut and error.reason == "unexpected end of data":
                issue = _cut_off(number, line[: error.start])
            self._reject(issue, line)
        except json.JSONDecodeError as error:
            found, reason = short(error.doc.strip()), json_sentence(error)
            issue = Issue(line=number, kind="json", reason=reason, value=found)
            self._reject(_cut_off(number, line) if is_cut and _is_begun(line) else issue, line)
        except RecordError as error:
            self._reject(_issue(number, "json", error), line)
        else:
            return self._convert(number, value, line)
        return None

    def _convert(self, line: int, value: object, source: object) -> Record | None:
        """Convert a record; one that cannot be converted is rejected."""
        assert self._format is not None
        try:
            record = convert(value, self._format, self._columns)
        except RecordError as error:
            self._reject(_issue(line, _kind_of(error), error), source)
            return None
        self._findings.pass_over(self._unread(value))
        return record

    def _unread(self, value: object) -> frozenset[str]:
        if not isinstance(value, Mapping) or self._format is None:
            return frozenset()
        if self._format is Format.OPENAI:
            return unread_fields(value) - self._format.fields
        if self._format is Format.COLUMNS and self._columns:
            return frozenset(value) - set(self._columns.columns)
        return frozenset(value) - self._format.fields

    def _is_good(self, line: int, record: Record, source: object, has_controls: bool) -> bool:
        issues = list(check_record(record))
        if has_controls:
            issues += check_control_characters(record)
        if issues:
            issues = [self._add(issue, line) for issue in issues]
            if any(issue.severity == "error" for issue in issues):
                self._findings.reject(issues, _as_bytes(source))
                return False
            if any(issue.kind == "empty_answer" for issue in issues):
                self._findings.count_all_empty(record)
        self._findings.count(record)
        self._findings.place = (self._part.name, line)
        return True

    def _reject(self, issue: Issue, source: object) -> None:
        issue = self._add(issue)
        if issue.line and issue.severity == "error":
            self._findings.reject([issue], _as_bytes(source))

    def _add(self, issue: Issue, line: int = 0) -> Issue:
        """Add a finding with the place where it was found, and return it."""
        if line or self._part.name:
            update = {"line": line or issue.line, "file": self._part.name}
            issue = issue.model_copy(update=update)
        self._findings.add(issue)
        return issue


def _try_json(text: bytes) -> list[object]:
    """Return the value of a text, or nothing where it has none."""
    if not text.strip():
        return []
    try:
        return [parse_json(text.decode("utf-8"))]
    except ValueError:
        return []


def _is_begun(line: bytes) -> bool:
    """Tell whether a line is the beginning of JSON and nothing else is wrong with it."""
    try:
        msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        return str(error) == _TRUNCATED
    return False


def _cut_off(line: int, text: bytes) -> Issue:
    column = len(text.decode("utf-8", errors="replace")) + 1
    reason = f"the record is cut off at column {column}; upload the file again"
    return Issue(line=line, kind="cut_off", reason=reason)


def _issue(line: int, kind: str, error: RecordError) -> Issue:
    path, value = short(error.path), short(error.value)
    return Issue(line=line, kind=kind, path=path, value=value, reason=error.reason)


def _kind_of(error: RecordError) -> str:
    """Return the short code of what is wrong with the form of a record."""
    for ending, kind in _KINDS:
        if error.path.endswith(ending):
            return kind
    return "record"


def _as_bytes(source: object) -> bytes:
    if isinstance(source, bytes):
        return source
    return json.dumps(source, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
