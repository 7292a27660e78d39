"""Read one line of OpenAI messages with msgspec, where it is plainly right; four times as fast.

`read_line` answers exactly what `from_openai(parse_json(line))` answers, or None, which is no
verdict: the strict way decides then, and its sentence is the finding. What msgspec would take and
the strict way would not is found by counting. In valid JSON every string has two quotes, and a quote
inside one has a backslash before it; so a line that has as many quotes as the values read from it
account for holds nothing else: no key twice, no field that was skipped.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from studio.domain.conversation import Conversation, Message, Role, ToolCall
from studio.domain.openai_messages import split_thinking
from studio.domain.strict_json import parse_json
from studio.intake.unread import MESSAGE_FIELDS, RECORD_FIELDS

# More levels than stand around any piece of a record (messages[0].tool_calls[0].function.arguments),
# so that a piece which passes within them passes within its record.
_AROUND = 8
_MAX_CACHED_BYTES = 2**16
# A quote that no quote accounts for: it would make up for one that should not be there.
_HIDDEN_QUOTE = b"\\u0022"
_CLEAR = (b"null", b"true", b"false", b"[]", b"{}")

_Text = str | UnsetType | None


class _Function(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    arguments: Raw | UnsetType = UNSET


class _Call(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    function: _Function
    id: _Text = UNSET
    type: Literal["function"] | UnsetType = UNSET


class _Part(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    role: Role
    content: str | list[_Part] | UnsetType | None = UNSET
    reasoning_content: _Text = UNSET
    tool_calls: list[_Call] | UnsetType | None = UNSET
    tool_call_id: _Text = UNSET
    name: _Text = UNSET
    weight: Literal[0, 1] | UnsetType | None = UNSET
    function_call: UnsetType | None = UNSET


class _Line(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    tools: Raw | UnsetType = UNSET


_CONVERSATION = msgspec.json.Decoder(Conversation)
_LINE = msgspec.json.Decoder(_Line)
_OBJECT = msgspec.json.Decoder(dict[str, Raw])
_OBJECTS = msgspec.json.Decoder(list[dict[str, Raw]])
_TEXT = msgspec.json.Decoder(str)
# All that msgspec, the codec and the strict parser raise are ValueErrors.
_REFUSALS = (ValueError, RecursionError)


class Read(NamedTuple):
    """A Conversation, and the paths of the fields beside it that nothing reads."""

    conversation: Conversation
    unread: frozenset[str] = frozenset()


def read_line(line: bytes) -> Read | None:
    """Read a line of OpenAI messages.

    Args:
        line: One JSON value in UTF-8.

    Returns:
        What `from_openai(parse_json(line))` returns, with the fields that it does not read; None
        when only that can tell, be it good or bad.
    """
    try:
        conversation = _read_plain(line) or _read_known(line)
        return _read_without_extras(line) if conversation is None else Read(conversation)
    except _REFUSALS:
        return None


# ---- what was read, as a Conversation ---------------------------------------------------------


class _UnsureError(ValueError):
    """Only the strict way can tell."""


class _Quotes:
    """Counts the quotes that the values read account for."""

    __slots__ = ("inside", "outside")

    def __init__(self) -> None:
        self.outside = 0  # around strings
        self.inside = 0  # escaped, in strings

    def key(self, value: str | None) -> str | None:
        """Account for a field that may hold a text."""
        self.outside += 2
        if value is not None:
            self.text(value)
        return value

    def text(self, value: str) -> None:
        """Account for a text."""
        self.outside += 2
        self.inside += value.count('"')

    def raw(self, value: Raw) -> bytes:
        """Account for a piece as it stands in the line."""
        piece = bytes(value)
        self.outside += piece.count(b'"')
        return piece


def _read_plain(line: bytes) -> Conversation | None:
    """Read messages with a role, a text and perhaps thinking and nothing else, as most are."""
    try:
        conversation = _CONVERSATION.decode(line)
    except msgspec.DecodeError:
        return None
    messages = conversation.messages
    # Around `messages`, and around role and content, keys and values: every line has these, so one
    # that has no more has no other field. An empty text may be a field that is not there.
    quotes = 2 + 8 * len(messages)
    found = line.count(b'"')
    if found != quotes:
        for message in messages:
            quotes += message.content.count('"')
            if message.reasoning_content is not None:
                quotes += 4 + message.reasoning_content.count('"')
        if found != quotes or _HIDDEN_QUOTE in line:
            return None
    has_thinking = False
    for message in messages:
        content = message.content
        if not content:
            return None
        if "<" in content and "<think>" in content:
            has_thinking = True
    if not has_thinking:
        return conversation
    return Conversation(messages=tuple([_with_thinking(message) for message in messages]))


def _with_thinking(message: Message) -> Message:
    if message.role != "assistant" or message.reasoning_content is not None:
        return message
    reasoning, content = split_thinking(message.content)
    return Message(role="assistant", content=content, reasoning_content=reasoning)


def _read_known(line: bytes) -> Conversation | None:
    """Read a line of any fields that are known."""
    try:
        return _convert(_LINE.decode(line), line)
    except msgspec.ValidationError:
        return None


def _convert(parsed: _Line, line: bytes) -> Conversation:
    quotes = _Quotes()
    quotes.outside = 2
    tools: tuple[dict[str, Any], ...] = ()
    if parsed.tools is not UNSET:
        quotes.outside += 2
        tools = _tools(quotes.raw(parsed.tools))
    messages = tuple([_message(message, quotes) for message in parsed.messages])
    found = line.count(b'"')
    if found != quotes.outside + quotes.inside or (quotes.inside and _HIDDEN_QUOTE in line):
        raise _UnsureError
    return Conversation(messages=messages, tools=tools)


def _message(parsed: _Message, quotes: _Quotes) -> Message:
    role, content = parsed.role, parsed.content
    if type(content) is str:
        quotes.outside += 8  # role and content, keys and values
        quotes.inside += content.count('"')
        text = content
    else:
        text = _content(parsed, quotes)
    reasoning = _optional(parsed.reasoning_content, quotes)
    if role == "assistant" and reasoning is None and "<think>" in text:
        reasoning, text = split_thinking(text)
    calls: tuple[ToolCall, ...] = ()
    if parsed.tool_calls is not UNSET:
        quotes.outside += 2
        calls = tuple([_call(call, quotes) for call in parsed.tool_calls or ()])
    weight: Literal[0, 1] = 1
    if parsed.weight is not UNSET:
        quotes.outside += 2
        if parsed.weight is not None and role != "assistant":
            raise _UnsureError
        weight = 0 if parsed.weight == 0 else 1
    if parsed.function_call is not UNSET:
        quotes.outside += 2
    return Message(
        role=role,
        content=text,
        reasoning_content=reasoning,
        tool_calls=calls,
        tool_call_id=_optional(parsed.tool_call_id, quotes),
        name=_optional(parsed.name, quotes),
        weight=weight,
    )


def _optional(value: _Text, quotes: _Quotes) -> str | None:
    return None if value is UNSET else quotes.key(value)


def _content(parsed: _Message, quotes: _Quotes) -> str:
    """Return content that is no plain text: parts, or nothing beside calls of tools."""
    content = parsed.content
    quotes.outside += 4
    if content is UNSET or content is None:
        if parsed.role != "assistant" or not parsed.tool_calls:
            raise _UnsureError
        quotes.outside += 0 if content is UNSET else 2
        return ""
    quotes.outside += 2
    texts = [part.text for part in content] if isinstance(content, list) else [content]
    for text in texts:
        quotes.outside += 6  # type, its value, text
        quotes.text(text)
    return "".join(texts)


def _call(parsed: _Call, quotes: _Quotes) -> ToolCall:
    function = parsed.function
    quotes.outside += 4  # function, name
    quotes.text(function.name)
    quotes.outside += 0 if parsed.type is UNSET else 4
    arguments: dict[str, Any] = {}
    if function.arguments is not UNSET:
        quotes.outside += 2
        arguments = _arguments(quotes.raw(function.arguments))
    return ToolCall(id=_optional(parsed.id, quotes), name=function.name, arguments=arguments)


def _arguments(piece: bytes) -> dict[str, Any]:
    value = parse_json(_TEXT.decode(piece) or "{}") if piece[:1] == b'"' else _parse(piece)
    if not isinstance(value, dict):
        raise _UnsureError
    return value


def _tools(piece: bytes) -> tuple[dict[str, Any], ...]:
    return _known_tools(piece) if len(piece) <= _MAX_CACHED_BYTES else _parse_tools(piece)


def _parse_tools(piece: bytes) -> tuple[dict[str, Any], ...]:
    value = _parse(piece)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _UnsureError
    return tuple(value)


# Conversations with tools offer the same ones over and over.
_known_tools = lru_cache(maxsize=256)(_parse_tools)


def _parse(piece: bytes) -> Any:
    """Parse a piece of a record as strictly as the record would be parsed."""
    value = parse_json("[" * _AROUND + piece.decode("utf-8") + "]" * _AROUND)
    for _ in range(_AROUND):
        value = value[0]
    return value


# ---- lines with fields that nothing reads -----------------------------------------------------


def _read_without_extras(line: bytes) -> Read | None:
    """Read a line without the fields that are not known, each of which is valid by itself."""
    if _HIDDEN_QUOTE in line:
        return None
    unread: set[str] = set()
    fields: dict[str, bytes] = {}
    quotes = 0
    for key, raw in _OBJECT.decode(line).items():
        if key in RECORD_FIELDS:
            fields[key] = bytes(raw)
        else:
            quotes += _skip(key, bytes(raw))
            unread.add(key)
    known = _joined(fields)
    conversation = (_read_plain(known) or _read_known(known)) if unread else None
    if conversation is None and "messages" in fields:
        fields["messages"], extra = _known_messages(fields["messages"], unread)
        known = _joined(fields)
        conversation = _read_plain(known) or _read_known(known)
        quotes += extra
    if conversation is None or not unread or known.count(b'"') + quotes != line.count(b'"'):
        return None
    return Read(conversation, frozenset(unread))


def _joined(fields: Mapping[str, bytes]) -> bytes:
    return b"{" + b",".join([b'"%b":%b' % (key.encode(), fields[key]) for key in fields]) + b"}"


def _known_messages(piece: bytes, unread: set[str]) -> tuple[bytes, int]:
    """Return messages without the fields that are not known, and how many quotes these have."""
    messages = []
    quotes = 0
    for message in _OBJECTS.decode(piece):
        fields = {}
        for key, raw in message.items():
            if key in MESSAGE_FIELDS:
                fields[key] = bytes(raw)
            else:
                quotes += _skip(key, bytes(raw))
                unread.add(f"messages[].{key}")
        messages.append(_joined(fields))
    return b"[" + b",".join(messages) + b"]", quotes


def _skip(key: str, piece: bytes) -> int:
    """Return how many quotes a field has that nothing reads, once it is found valid."""
    if piece[:1] == b'"':
        _TEXT.decode(piece)
    elif piece not in _CLEAR:
        _parse(piece)
    return 2 + key.count('"') + piece.count(b'"')
