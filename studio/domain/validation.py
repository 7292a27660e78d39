"""Read a file of conversations line by line and report what is wrong, with line numbers."""

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import Field

from studio.domain.conversation import (
    Conversation,
    RecordError,
    from_openai,
    json_sentence,
    parse_json,
)
from studio.domain.section import Section
from studio.errors import InputError

MAX_LINE_BYTES = 16 * 2**20
MAX_ISSUES = 200
# Turn markers of the ChatML format, which all families of the studio use: typed into content,
# they would end a turn in the middle of it.
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive or an Excel workbook"),
    (b"\x1f\x8b", "a gzip file"),
    (b"PAR1", "a Parquet file"),
    (codecs.BOM_UTF16_LE, "text in UTF-16"),
    (codecs.BOM_UTF16_BE, "text in UTF-16"),
    (b"%PDF", "a PDF"),
)

Severity = Literal["error", "warning", "note"]


class Issue(Section):
    """One finding.

    Attributes:
        line: Line of the file, from 1; 0 for the file as a whole.
        path: Place in the record, as in `messages[2].role`.
        value: What stands there, shortened.
    """

    line: int = Field(ge=0)
    path: str = ""
    value: str = ""
    reason: str
    severity: Severity = "error"

    def __str__(self) -> str:
        """Return the finding as one sentence."""
        where = ", ".join(
            part for part in (f"line {self.line}" if self.line else "", self.path) if part
        )
        value = f" (found {self.value})" if self.value else ""
        return f"{where + ': ' if where else ''}{self.reason}{value}"


class Report(Section):
    """What was recognised in a file, and everything that was found."""

    format: str = "OpenAI messages, JSON lines"
    num_lines: int = 0
    num_conversations: int = 0
    num_messages: int = 0
    num_characters: int = 0
    roles: dict[str, int] = Field(default_factory=dict)
    num_multi_turn: int = 0
    num_with_system: int = 0
    num_with_reasoning: int = 0
    num_with_tools: int = 0
    num_errors: int = 0
    num_warnings: int = 0
    issues: tuple[Issue, ...] = Field(default=(), description="The first findings, up to 200.")

    @property
    def is_accepted(self) -> bool:
        """Whether the file can become a Dataset."""
        return self.num_errors == 0 and self.num_conversations > 0


class Reader:
    """Reads conversations from a stream and keeps the counts that make the Report."""

    def __init__(self) -> None:
        self._issues: list[Issue] = []
        self._severities: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._roles: Counter[str] = Counter()
        self._seen: dict[int, int] = {}

    def read(self, stream: BinaryIO) -> Iterator[Conversation]:
        """Yield each good Conversation; findings go to the Report.

        Args:
            stream: A binary stream of the whole file.
        """
        if self._is_foreign(stream):
            return
        line_number = 0
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            line_number += 1
            if line_number == 1 and raw.startswith(codecs.BOM_UTF8):
                raw = raw.removeprefix(codecs.BOM_UTF8)
                self._add(Issue(line=1, reason="a byte order mark was removed", severity="note"))
            if len(raw) > MAX_LINE_BYTES:
                self._add(Issue(line=line_number, reason="the line is longer than 16 MiB"))
                if not raw.endswith(b"\n"):
                    _skip_line(stream)
                continue
            if not raw.strip():
                continue
            conversation = self._parse(line_number, raw)
            if conversation is not None:
                self._count(line_number, conversation)
                yield conversation
        self._counts["lines"] = line_number
        if not self._counts["conversations"] and not self._severities["error"]:
            self._add(Issue(line=0, reason="the file holds no conversations"))

    def report(self) -> Report:
        """Return the Report of what was read so far."""
        counts = self._counts
        return Report(
            num_lines=counts["lines"],
            num_conversations=counts["conversations"],
            num_messages=sum(self._roles.values()),
            num_characters=counts["characters"],
            roles=dict(self._roles),
            num_multi_turn=counts["multi_turn"],
            num_with_system=counts["system"],
            num_with_reasoning=counts["reasoning"],
            num_with_tools=counts["tools"],
            num_errors=self._severities["error"],
            num_warnings=self._severities["warning"],
            issues=tuple(self._issues),
        )

    def _is_foreign(self, stream: BinaryIO) -> bool:
        head = stream.read(4096)
        stream.seek(0)
        for magic, name in _FOREIGN:
            if head.startswith(magic):
                reason = f"the file is {name}; save it as JSON lines in UTF-8"
                self._add(Issue(line=0, reason=reason))
                return True
        if b"\0" in head:
            reason = "the file is binary or text in UTF-16; save it as JSON lines in UTF-8"
            self._add(Issue(line=0, reason=reason))
            return True
        if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            reason = "the file is one JSON array; write one conversation a line instead"
            self._add(Issue(line=1, reason=reason))
            return True
        return False

    def _parse(self, line: int, raw: bytes) -> Conversation | None:
        try:
            # Without the line's end, which would put the column of a cut line on the next one.
            record = parse_json(raw.decode("utf-8").rstrip("\r\n"))
            conversation = from_openai(record)
        except UnicodeDecodeError as error:
            reason = f"byte {error.start + 1} of the line is not UTF-8"
            self._add(Issue(line=line, reason=reason, value=hex(raw[error.start])))
        except json.JSONDecodeError as error:
            self._add(
                Issue(line=line, reason=json_sentence(error), value=_short(error.doc.strip()))
            )
        except RecordError as error:
            path, value = _short(error.path), _short(error.value)
            self._add(Issue(line=line, path=path, value=value, reason=error.reason))
        else:
            return conversation if self._rules_hold(line, conversation) else None
        return None

    def _rules_hold(self, line: int, conversation: Conversation) -> bool:
        before = self._severities["error"]
        for issue in check_rules(conversation):
            self._add(issue.model_copy(update={"line": line}))
        return self._severities["error"] == before

    def _count(self, line: int, conversation: Conversation) -> None:
        key = hash(conversation.to_json())
        if key in self._seen:
            self._add(
                Issue(
                    line=line,
                    reason=f"the same conversation as line {self._seen[key]}",
                    severity="warning",
                )
            )
        self._seen.setdefault(key, line)
        messages = conversation.messages
        self._roles.update(message.role for message in messages)
        self._counts.update(
            conversations=1,
            characters=sum(len(message.content) for message in messages),
            multi_turn=sum(message.role == "user" for message in messages) > 1,
            system=messages[0].role in ("system", "developer"),
            reasoning=any(message.reasoning_content for message in messages),
            tools=any(message.tool_calls for message in messages),
        )

    def _add(self, issue: Issue) -> None:
        self._severities[issue.severity] += 1
        if len(self._issues) < MAX_ISSUES:
            self._issues.append(issue)


def check_rules(conversation: Conversation) -> Iterator[Issue]:
    """Yield what is wrong with a Conversation that is well formed (line numbers are left at 0)."""
    messages = conversation.messages
    if not any(message.role == "assistant" for message in messages):
        yield Issue(line=0, path="messages", reason="no assistant message: nothing to learn")
    if not any(message.role == "user" for message in messages):
        yield Issue(line=0, path="messages", reason="no user message: nothing is asked")
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.role in ("system", "developer") and index > 0:
            yield Issue(
                line=0,
                path=f"{path}.role",
                value=message.role,
                reason="a system message stands only at the beginning",
            )
        if message.role == "assistant" and not message.content.strip() and not message.tool_calls:
            yield Issue(line=0, path=f"{path}.content", reason="the assistant's answer is empty")
    yield from _check_tool_results(conversation)
    for path, text in _rendered(conversation):
        for token in CONTROL_TOKENS:
            if token in text:
                yield Issue(
                    line=0,
                    path=path,
                    value=token,
                    reason="a control token of the chat format stands in the text",
                )


def _check_tool_results(conversation: Conversation) -> Iterator[Issue]:
    calls: set[str | None] = set()
    for index, message in enumerate(conversation.messages):
        path = f"messages[{index}]"
        if message.role == "tool" and not calls:
            yield Issue(line=0, path=path, reason="a tool result without a call before it")
        elif message.role == "tool" and message.tool_call_id not in calls | {None}:
            yield Issue(
                line=0,
                path=f"{path}.tool_call_id",
                value=_short(message.tool_call_id),
                reason="no call has this id",
            )
        calls.update(call.id for call in message.tool_calls)


def _rendered(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Yield path and text of everything that a chat template writes out."""
    for index, message in enumerate(conversation.messages):
        yield f"messages[{index}].content", message.content
        yield f"messages[{index}].reasoning_content", message.reasoning_content or ""
        for number, call in enumerate(message.tool_calls):
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            yield f"messages[{index}].tool_calls[{number}]", call.name + arguments
    for index, tool in enumerate(conversation.tools):
        yield f"tools[{index}]", json.dumps(tool, ensure_ascii=False)


def check_file(path: Path) -> Report:
    """Read a whole file and report.

    Raises:
        InputError: The file does not exist or cannot be read.
    """
    reader = Reader()
    with open_dataset(path) as stream:
        for _ in reader.read(stream):
            continue
    return reader.report()


def open_dataset(path: Path) -> BinaryIO:
    """Open a file of conversations.

    Raises:
        InputError: It does not exist, is a folder, or cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(
            f"The file {path} cannot be read: {(error.strerror or str(error)).lower()}.",
            "Give the path of a JSON lines file.",
        ) from error


def _skip_line(stream: BinaryIO) -> None:
    while chunk := stream.readline(2**20):
        if chunk.endswith(b"\n"):
            return


def _short(value: object, limit: int = 80) -> str:
    """Return a value on one line, cut to `limit`, with what cannot be printed escaped."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
