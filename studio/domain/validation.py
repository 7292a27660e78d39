"""What can be wrong with a record, and the Report of a whole file."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import msgspec
from pydantic import Field

from studio.domain.conversation import Conversation, Kind, Message, PlainText, Preference, Record
from studio.domain.section import Section

MAX_ISSUES = 200
MAX_ISSUES_PER_KIND = 20
# Turn markers of the ChatML format, which all families of the studio use: typed into content,
# they would end a turn in the middle of it.
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
# What JSON may only hold escaped, without tab, line feed and carriage return.
_CONTROL_CHARACTER = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f]")
_SYSTEM = ("system", "developer")

Severity = Literal["error", "warning", "note"]


class Issue(Section):
    """One finding.

    Attributes:
        line: Line of the file, from 1; 0 for the file as a whole.
        kind: Short code by which findings are counted, as in `tool_arguments`.
        file: Name of the part in an archive; empty where the file is one part.
        path: Place in the record, as in `messages[2].role`.
        value: What stands there, shortened.
    """

    line: int = Field(ge=0)
    kind: str = ""
    file: str = ""
    path: str = ""
    value: str = ""
    reason: str
    severity: Severity = "error"

    def __str__(self) -> str:
        """Return the finding as one sentence."""
        line = f"line {self.line}" if self.line else ""
        where = ", ".join(part for part in (self.file, line, self.path) if part)
        value = f" (found {self.value})" if self.value else ""
        return f"{where + ': ' if where else ''}{self.reason}{value}"


class Report(Section):
    """What was recognised in a file, and everything that was found.

    Attributes:
        format: What was recognised, for people.
        counts: How many findings there are of each kind, notes included.
        columns: Columns of a table whose meaning somebody has to say.
        num_conversations: Good records, of whatever kind.
        num_rejected: Records with an error; they are left out when the good ones are kept.
        num_file_errors: Errors of the file as a whole; nothing of it can be kept.
    """

    kind: Kind = Kind.CONVERSATIONS
    format: str = "OpenAI messages, JSON lines"
    num_lines: int = 0
    num_blank_lines: int = 0
    num_conversations: int = 0
    num_rejected: int = 0
    num_messages: int = 0
    num_characters: int = 0
    roles: dict[str, int] = Field(default_factory=dict)
    num_multi_turn: int = 0
    num_with_system: int = 0
    num_with_reasoning: int = 0
    num_with_tools: int = 0
    num_with_images: int = 0
    num_empty_think: int = 0
    num_near_duplicates: int = 0
    num_errors: int = 0
    num_file_errors: int = 0
    num_warnings: int = 0
    counts: dict[str, int] = Field(default_factory=dict)
    columns: tuple[str, ...] = ()
    issues: tuple[Issue, ...] = Field(
        default=(), description="The first findings: 20 of a kind, about 200 in all."
    )

    @property
    def is_accepted(self) -> bool:
        """Whether the whole file can become a Dataset."""
        return self.num_errors == 0 and self.num_conversations > 0

    @property
    def is_salvageable(self) -> bool:
        """Whether the good records can become a Dataset when the bad ones are dropped."""
        return self.num_errors > 0 and self.num_conversations > 0 and self.num_file_errors == 0


def check_rules(conversation: Conversation) -> Iterator[Issue]:
    """Yield what is wrong with a Conversation that is well formed (line numbers are left at 0)."""
    messages = conversation.messages
    if _is_plain(messages) and not conversation.tools:
        return
    yield from _check_parts(messages)
    yield from _check_turns(messages)
    yield from _check_tool_results(messages)
    yield from _check_tool_names(conversation)
    yield from _check_control_tokens(_rendered(conversation))


def check_record(record: Record) -> Iterator[Issue]:
    """Return what is wrong with a record of any kind (line numbers are left at 0)."""
    if isinstance(record, Conversation):
        return check_rules(record)
    if isinstance(record, Preference):
        return _check_preference(record)
    return _check_text(record)


def check_control_characters(record: Record) -> Iterator[Issue]:
    """Yield a warning at the first NUL or other control character of a record.

    It is no part of `check_rules`, as it reads every character: whoever has the bytes knows at
    once that most files hold none.
    """
    for path, text in _texts(record):
        found = _CONTROL_CHARACTER.search(text)
        if found is not None:
            reason = f"a control character stands at character {found.start() + 1} of the text"
            yield _issue("control_character", path, reason, repr(found[0])[1:-1], "warning")
            return


def short(value: object, limit: int = 80) -> str:
    """Return a value on one line, cut to `limit`, with what cannot be printed escaped."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _issue(
    kind: str, path: str, reason: str, value: object = "", severity: Severity = "error"
) -> Issue:
    return Issue(line=0, kind=kind, path=path, value=short(value), reason=reason, severity=severity)


# ---- conversations ----------------------------------------------------------------------------


def _is_plain(messages: Sequence[Message]) -> bool:
    """Tell at a glance that no rule is broken, as in most conversations; False is no verdict."""
    if not _is_regular(tuple([message.role for message in messages])):
        return False
    for message in messages:
        content = message.content
        # One character is found many times as fast as two.
        if not content or content.isspace() or ("<" in content and "<|" in content):
            return False
        if message.tool_calls or not message.weight:
            return False
        if message.reasoning_content and "<|" in message.reasoning_content:
            return False
    return True


@lru_cache(maxsize=1024)
def _is_regular(roles: tuple[str, ...]) -> bool:
    """Tell whether users and assistants take turns, after a system message at most."""
    turns = roles[1:] if roles[0] in _SYSTEM else roles
    pair = ("user", "assistant")
    return len(turns) > 1 and all(role == pair[n % 2] for n, role in enumerate(turns))


def _check_parts(messages: Sequence[Message]) -> Iterator[Issue]:
    """Look for what must be there, and for answers that teach nothing."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        yield _issue("no_assistant", "messages", "no assistant message: nothing to learn")
    elif not any(message.weight for message in answers):
        reason = "every assistant message has weight 0: nothing to learn"
        yield _issue("weight", "messages", reason)
    if not any(message.role == "user" for message in messages):
        yield _issue("no_user", "messages", "no user message: nothing is asked")
    for index, message in enumerate(messages):
        if message.role == "assistant" and is_empty_answer(message):
            reason = "the assistant's answer is empty"
            yield _issue("empty_answer", f"messages[{index}].content", reason, "", "warning")


def is_empty_answer(message: Message) -> bool:
    """Tell whether an assistant's message neither says nor calls anything."""
    return not message.tool_calls and not message.content.strip()


def _check_turns(messages: Sequence[Message]) -> Iterator[Issue]:
    """Look at who speaks after whom.

    Two of a kind in a row are warnings: the templates of both families render them, others raise.
    """
    before = ""
    for index, message in enumerate(messages):
        role, path = message.role, f"messages[{index}].role"
        if role in _SYSTEM:
            if index > 0:
                reason = "a system message stands only at the beginning"
                yield _issue("system", path, reason, role)
            continue
        if role == "assistant" and not before:
            reason = "the conversation starts with the assistant; some chat templates refuse that"
            yield _issue("alternation", path, reason, "", "warning")
        elif role == before and role != "tool":
            reason = f"two {role} messages in a row; some chat templates refuse that"
            yield _issue("alternation", path, reason, "", "warning")
        before = role


def _check_tool_results(messages: Sequence[Message]) -> Iterator[Issue]:
    """Match results with calls.

    A call without a result is a warning, as the model never sees what it asked for and learns to
    go on without. A conversation that ends with a call is none: it teaches the call itself.
    """
    known: set[str | None] = set()
    waiting: list[tuple[str, str | None]] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.role != "tool":
            yield from _unanswered(waiting)
            waiting = [
                (f"{path}.tool_calls[{number}]", call.id)
                for number, call in enumerate(message.tool_calls)
            ]
            known.update(call.id for call in message.tool_calls)
        elif not known:
            yield _issue("tool_result", path, "a tool result without a call before it")
        elif message.tool_call_id not in known | {None}:
            reason = "no call has this id"
            yield _issue("tool_result", f"{path}.tool_call_id", reason, message.tool_call_id)
        else:
            answered = (place for place, id_ in waiting if message.tool_call_id in (id_, None))
            place = next(answered, None)
            waiting = [call for call in waiting if call[0] != place]
    if messages[-1].role == "tool":
        yield from _unanswered(waiting)


def _unanswered(waiting: Sequence[tuple[str, str | None]]) -> Iterator[Issue]:
    for path, id_ in waiting:
        yield _issue("tool_call", path, "the call has no result", id_ or "", "warning")


def _check_tool_names(conversation: Conversation) -> Iterator[Issue]:
    """Warn of calls to tools that are not offered; rendering works, but the model learns that."""
    if not conversation.tools:
        return
    declared = set()
    for tool in conversation.tools:
        function = tool.get("function")
        declared.add(str((function if isinstance(function, dict) else tool).get("name")))
    for index, message in enumerate(conversation.messages):
        for number, call in enumerate(message.tool_calls):
            if call.name not in declared:
                path = f"messages[{index}].tool_calls[{number}].function.name"
                reason = "the conversation's tools declare none of this name"
                yield _issue("tool_undeclared", path, reason, call.name, "warning")


def _check_control_tokens(
    texts: Iterator[tuple[str, str]] | list[tuple[str, str]],
) -> Iterator[Issue]:
    for path, text in texts:
        if "<|" not in text:
            continue
        for token in CONTROL_TOKENS:
            if token in text:
                reason = "a control token of the chat format stands in the text"
                yield _issue("control_token", path, reason, token)


def _rendered(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Yield path and text of everything that a chat template writes out."""
    yield from _message_texts("messages", conversation.messages)
    for index, tool in enumerate(conversation.tools):
        yield f"tools[{index}]", _as_json(tool)


def _message_texts(name: str, messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    for index, message in enumerate(messages):
        yield f"{name}[{index}].content", message.content
        if message.reasoning_content:
            yield f"{name}[{index}].reasoning_content", message.reasoning_content
        for number, call in enumerate(message.tool_calls):
            yield f"{name}[{index}].tool_calls[{number}]", call.name + _as_json(call.arguments)


def _as_json(value: object) -> str:
    return msgspec.json.encode(value).decode("utf-8")


# ---- other records ----------------------------------------------------------------------------


def _check_preference(record: Preference) -> Iterator[Issue]:
    """Check the prompt with either continuation, as each of the two is rendered."""
    seen = set()
    for name, answer in (("chosen", record.chosen), ("rejected", record.rejected)):
        whole = Conversation(messages=(*record.messages, *answer), tools=record.tools)
        for issue in check_rules(whole):
            path = _branch_path(issue.path, name, len(record.messages))
            if (issue.kind, path) not in seen:
                seen.add((issue.kind, path))
                yield issue.model_copy(update={"path": path})
    if record.chosen == record.rejected:
        yield _issue("preference", "rejected", "the rejected answer is the chosen one")


def _check_text(record: PlainText) -> Iterator[Issue]:
    if not record.text.strip():
        yield _issue("empty_text", "text", "the text is empty")
    yield from _check_control_tokens([("text", record.text)])


def _branch_path(path: str, name: str, num_prompt: int) -> str:
    """Return the path in the record of a path in prompt and continuation put together."""
    if path == "messages":
        return name
    found = re.match(r"messages\[(\d+)\]", path)
    if found is None or int(found[1]) < num_prompt:
        return path
    return f"{name}[{int(found[1]) - num_prompt}]{path[found.end() :]}"


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    if isinstance(record, PlainText):
        yield "text", record.text
        return
    yield from _message_texts("messages", record.messages)
    if isinstance(record, Preference):
        yield from _message_texts("chosen", record.chosen)
        yield from _message_texts("rejected", record.rejected)
