"""Conversation: the one record shape; every format becomes it."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NoReturn, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from studio.domain.section import Section

# pydantic 2.14 writes a Conversation with values of 254 levels in it and reads one of 197 (measured);
# what lies between would be stored and then be unreadable.
MAX_DEPTH = 100
# Python's own limit, https://docs.python.org/3/library/stdtypes.html#int-max-str-digits
MAX_DIGITS = 4300

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ToolCall(Section):
    """One call of a function by the model. Arguments are an object, whatever form they came in."""

    id: str | None = None
    name: str = Field(min_length=1)
    arguments: dict[str, Any]


class Message(Section):
    """One message of a Conversation."""

    role: Role
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


class Conversation(Section):
    """Messages, and the function schemas that the model may call in them."""

    messages: tuple[Message, ...] = Field(min_length=1)
    tools: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> str:
        """Return the canonical line: same content, same bytes."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Parse a canonical line."""
        return cls.model_validate_json(line)

    def template_messages(self) -> list[dict[str, Any]]:
        """Return the messages in the shape that chat templates read."""
        messages = []
        for message in self.messages:
            # Templates of both families know no developer role; it is the newer name of system.
            role = "system" if message.role == "developer" else message.role
            values: dict[str, Any] = {"role": role, "content": message.content}
            if message.reasoning_content is not None:
                values["reasoning_content"] = message.reasoning_content
            if message.tool_calls:
                values["tool_calls"] = [
                    {"type": "function", "function": call.model_dump(include={"name", "arguments"})}
                    for call in message.tool_calls
                ]
            messages.append(values)
        return messages


# ---- OpenAI messages, as they come ------------------------------------------------------------
# https://platform.openai.com/docs/guides/fine-tuning: content as text or as text parts,
# tool_calls with a nested function whose arguments are a JSON string.


class _Function(Section):
    name: str = Field(min_length=1)
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments", mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            parsed = parse_json(value or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"the arguments are {json_sentence(error)}") from error
        except RecordError as error:
            raise ValueError(f"in the arguments, {error}") from error
        if not isinstance(parsed, dict):
            raise ValueError("the arguments are JSON, but not an object")
        return parsed


class _OpenAIToolCall(Section):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class _OpenAIMessage(Section):
    model_config = ConfigDict(extra="ignore")

    role: Role
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[_OpenAIToolCall, ...] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    weight: float | None = None
    function_call: None = None

    @field_validator("weight")
    @classmethod
    def _is_trained(cls, value: float | None) -> float | None:
        if value not in (None, 1):
            raise ValueError("only weight 1 is known: every reply of the assistant is trained")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        texts = []
        for index, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(
                    f"part {index} is of type {kind!r}; only text parts can be trained"
                )
            text = part.get("text")
            if not isinstance(text, str):
                raise ValueError(f"part {index} has no text")
            texts.append(text)
        return "".join(texts)

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing; only an assistant that calls tools may omit it")
        return self

    def to_message(self) -> Message:
        calls = tuple(
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in self.tool_calls or ()
        )
        return Message(
            role=self.role,
            content=self.content or "",
            reasoning_content=self.reasoning_content,
            tool_calls=calls,
            tool_call_id=self.tool_call_id,
            name=self.name,
        )


class _OpenAIRecord(Section):
    model_config = ConfigDict(extra="ignore")

    messages: tuple[_OpenAIMessage, ...] = Field(min_length=1)
    tools: tuple[dict[str, Any], ...] | None = None


class RecordError(ValueError):
    """A record is not a Conversation.

    Args:
        path: Where in the record, as in `messages[2].role`.
        value: What stands there.
        reason: What is expected instead.
    """

    def __init__(self, path: str, value: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self.path = path
        self.value = value
        self.reason = reason


def from_openai(record: object) -> Conversation:
    """Convert one OpenAI-messages record.

    Args:
        record: A parsed JSON value.

    Returns:
        The Conversation.

    Raises:
        RecordError: The record is no OpenAI-messages object; names the first wrong place.
    """
    if not isinstance(record, dict):
        raise RecordError("", record, "a conversation is an object with a list `messages`")
    if "messages" not in record:
        raise RecordError("messages", sorted(record)[:8], "the list `messages` is missing")
    try:
        parsed = _OpenAIRecord.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        reason = _SENTENCES.get(first["type"], message[:1].lower() + message[1:])
        raise RecordError(_path(first["loc"]), first["input"], reason) from error
    return Conversation(
        messages=tuple(message.to_message() for message in parsed.messages),
        tools=parsed.tools or (),
    )


# pydantic's own words name Python types, which a reader of JSON does not know.
_SENTENCES = {
    "missing": "this field is missing",
    "tuple_type": "a list is expected",
    "dict_type": "an object is expected",
    "model_type": "an object is expected",
    "string_type": "text is expected",
    "too_short": "at least one entry is expected",
    "string_too_short": "it must not be empty",
    "extra_forbidden": "a field of this name is not known here",
    "none_required": "this is an older form; write it as tool_calls",
}


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


# ---- JSON, as RFC 8259 has it -----------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Parse JSON and refuse what the canonical line could not hold.

    Raises:
        json.JSONDecodeError: The text is not JSON.
        RecordError: It holds a key twice, NaN, a number out of range, half a surrogate pair, or
            too many levels.
    """
    too_deep = RecordError("", "", f"the record is nested more than {MAX_DEPTH} levels deep")
    try:
        value = json.loads(
            text,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=_unique,
        )
    except RecursionError as error:
        raise too_deep from error
    for path, node in _walk(value):
        if isinstance(node, dict | list) and len(path) >= MAX_DEPTH:
            raise too_deep
        if isinstance(node, str) and not _is_unicode(node):
            reason = "an unpaired surrogate stands for no character"
            raise RecordError(_path(path), node, reason)
    return value


def json_sentence(error: json.JSONDecodeError) -> str:
    """Return what is wrong with the text and where, as in `not JSON: extra data at column 7`."""
    message = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
    return f"not JSON: {message} at column {error.colno}"


def _refuse(constant: str) -> NoReturn:
    raise RecordError("", "", f"not JSON: {constant} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise RecordError("", digits, "the number is too large")
    return number


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise RecordError(
            "", "", f"a number has {len(digits)} digits; at most {MAX_DIGITS} are read"
        )
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RecordError(twice, "", "the key stands twice in one object")
    return values


def _walk(value: object) -> Iterator[tuple[tuple[int | str, ...], object]]:
    """Yield every value and every key with its path, in the order of the text."""
    stack: list[tuple[tuple[int | str, ...], object]] = [((), value)]
    while stack:
        path, node = stack.pop()
        yield path, node
        if isinstance(node, list):
            stack.extend(((*path, index), node[index]) for index in reversed(range(len(node))))
        elif isinstance(node, dict):
            for key in reversed(node):
                stack += [((*path, key), node[key]), ((*path, key), key)]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
