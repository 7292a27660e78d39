"""Keep what was found in a file, and count what is in it, in memory that does not grow."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import BinaryIO

from studio.domain.conversation import (
    Conversation,
    Kind,
    Message,
    PlainText,
    Preference,
    Record,
)
from studio.domain.validation import (
    MAX_ISSUES,
    MAX_ISSUES_PER_KIND,
    Issue,
    Report,
    is_empty_answer,
    short,
)
from studio.intake.lines import HEAD_BYTES

_MAX_SHAPES = 1000
# More names than that are no fields: somebody keeps data in keys.
_MAX_FIELDS = 1000
_MAX_FIELDS_NAMED = 20


class Findings:
    """What was found so far.

    Args:
        keep_rejects: Takes one JSON object a line for each record with an error; None for none.

    Attributes:
        place: File and line of the good record that was counted last.
    """

    place: tuple[str, int] = ("", 0)

    def __init__(self, keep_rejects: BinaryIO | None = None) -> None:
        self._keep_rejects = keep_rejects
        self._issues: list[Issue] = []
        self._kept: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._severities: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._shapes: Counter[tuple[str, ...]] = Counter()
        self._roles: Counter[str] = Counter()
        self._fields: Counter[str] = Counter()

    @property
    def num_records(self) -> int:
        """Good records so far."""
        return self._counts["records"]

    def add(self, issue: Issue) -> None:
        """Count a finding, and keep it where no room is taken from other kinds."""
        self._severities[issue.severity] += 1
        self._kinds[issue.kind] += 1
        if issue.severity == "error" and issue.line == 0:
            self._counts["file_errors"] += 1
        is_first = not self._kept[issue.kind]
        if is_first or (
            len(self._issues) < MAX_ISSUES and self._kept[issue.kind] < MAX_ISSUES_PER_KIND
        ):
            self._kept[issue.kind] += 1
            self._issues.append(issue)

    def add_to_file(self, kind: str, reason: str, file: str = "") -> None:
        """Add an error of the file as a whole."""
        self.add(Issue(line=0, kind=kind, file=file, reason=reason))

    def reject(self, issues: Sequence[Issue], raw: bytes) -> None:
        """Leave a record out.

        Args:
            issues: What is wrong with it, already added; at least one.
            raw: The record as the file has it; its beginning is kept.
        """
        self._counts["rejected"] += 1
        if self._keep_rejects is None:
            return
        text = raw[:HEAD_BYTES].decode("utf-8", errors="backslashreplace")
        findings = [
            issue.model_dump(include={"kind", "path", "value", "reason", "severity"})
            for issue in issues
        ]
        reject = {"line": issues[0].line, "file": issues[0].file, "text": text}
        line = json.dumps({**reject, "findings": findings}, ensure_ascii=False)
        self._keep_rejects.write(line.encode("utf-8") + b"\n")

    def pass_over(self, fields: Iterable[str]) -> None:
        """Count the fields of one record that nothing reads."""
        for field in fields:
            if field in self._fields or len(self._fields) < _MAX_FIELDS:
                self._fields[field] += 1
            else:
                self._counts["other_fields"] += 1

    def count_lines(self, lines: int, blank: int) -> None:
        """Count lines of a part, and how many of them are blank."""
        self._counts["lines"] += lines
        self._counts["blank"] += blank

    def count(self, record: Record) -> None:
        """Count a good record."""
        counts = self._counts
        counts["records"] += 1
        if isinstance(record, PlainText):
            counts["characters"] += len(record.text)
            return
        messages = record.messages
        if isinstance(record, Preference):
            messages = (*messages, *record.chosen, *record.rejected)
        characters, has_more = 0, False
        roles = []
        for message in messages:
            characters += len(message.content)
            roles.append(message.role)
            if message.reasoning_content is not None or message.tool_calls or message.images:
                has_more = True
        counts["characters"] += characters
        self._count_shape(tuple(roles))
        if has_more:
            self._count_rarer(messages)

    def count_all_empty(self, record: Record) -> None:
        """Count a good record if every answer in it is empty."""
        if isinstance(record, Conversation) and all(
            is_empty_answer(message) for message in record.messages if message.role == "assistant"
        ):
            self._counts["all_empty"] += 1

    def _count_rarer(self, messages: Sequence[Message]) -> None:
        thoughts = {message.reasoning_content for message in messages} - {None}
        self._counts["reasoning"] += any(thoughts)
        self._counts["empty_think"] += "" in thoughts
        self._counts["tools"] += any(message.tool_calls for message in messages)
        self._counts["images"] += any(message.images for message in messages)

    def _count_shape(self, shape: tuple[str, ...]) -> None:
        # Most files have a few shapes, so that roles need not be counted one by one.
        self._shapes[shape] += 1
        if len(self._shapes) > _MAX_SHAPES:
            self._unfold_shapes()

    def _unfold_shapes(self) -> None:
        for shape, count in self._shapes.items():
            for role in shape:
                self._roles[role] += count
            self._counts["multi_turn"] += count * (shape.count("user") > 1)
            self._counts["system"] += count * (shape[0] in ("system", "developer"))
        self._shapes.clear()

    def close(self) -> None:
        """Add what only the whole file shows."""
        for field, count in self._fields.most_common(_MAX_FIELDS_NAMED):
            self._note_field(field, f"the field is not read; {_records(count)} it")
        others = len(self._fields) - _MAX_FIELDS_NAMED
        if others > 0:
            more = " or more" if self._counts["other_fields"] else ""
            self._note_field("", f"{others}{more} other fields are not read")
        if not self.num_records and self._kinds["no_assistant"] >= self._counts["rejected"] > 0:
            reason = "no record has an assistant's message: nothing to learn"
            self.add_to_file("no_assistant", reason)
        elif not self.num_records and not self._severities["error"]:
            self.add_to_file("empty", "the file holds no records")
        elif 0 < self.num_records == self._counts["all_empty"]:
            self.add_to_file("empty_answer", "every answer in the file is empty")

    def _note_field(self, path: str, reason: str) -> None:
        self.add(
            Issue(line=0, kind="unknown_field", path=short(path), reason=reason, severity="note")
        )

    def report(self, *, kind: Kind, title: str, columns: tuple[str, ...]) -> Report:
        """Return the Report of what was found.

        Args:
            kind: What the records are.
            title: Name of layout and format.
            columns: Columns that somebody has to name; empty where nobody has.
        """
        self._unfold_shapes()
        counts = self._counts
        return Report(
            kind=kind,
            format=title,
            num_lines=counts["lines"],
            num_blank_lines=counts["blank"],
            num_conversations=counts["records"],
            num_rejected=counts["rejected"],
            num_messages=self._roles.total(),
            num_characters=counts["characters"],
            roles=dict(self._roles),
            num_multi_turn=counts["multi_turn"],
            num_with_system=counts["system"],
            num_with_reasoning=counts["reasoning"],
            num_with_tools=counts["tools"],
            num_with_images=counts["images"],
            num_empty_think=counts["empty_think"],
            num_errors=self._severities["error"],
            num_file_errors=counts["file_errors"],
            num_warnings=self._severities["warning"],
            counts=dict(self._kinds),
            columns=columns,
            issues=tuple(self._issues),
        )


def _records(count: int) -> str:
    return "1 record has" if count == 1 else f"{count} records have"
