"""Conversation: the one record shape; every format becomes it."""

import json
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from studio.domain.section import Section

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
            parsed = json.loads(value or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"the arguments are not JSON ({error.msg})") from error
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
        super().__init__(f"{path}: {reason}")
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
        reason = first["msg"].removeprefix("Value error, ")
        raise RecordError(_path(first["loc"]), first["input"], reason) from error
    return Conversation(
        messages=tuple(message.to_message() for message in parsed.messages),
        tools=parsed.tools or (),
    )


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")
