"""OpenAI messages as they come, checked and made into a Conversation.

https://platform.openai.com/docs/guides/fine-tuning: content as text or as parts, tool_calls with a
nested function whose arguments are a JSON string.
"""

import json
from typing import Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from studio.domain.conversation import Conversation, Image, Message, Role, ToolCall
from studio.domain.section import Section
from studio.domain.strict_json import RecordError, json_sentence, parse_json, path_of


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


class _Content(NamedTuple):
    text: str
    images: tuple[Image, ...] = ()


class _OpenAIMessage(Section):
    model_config = ConfigDict(extra="ignore")

    role: Role
    content: _Content | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[_OpenAIToolCall, ...] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    weight: float | None = None
    function_call: None = None

    @field_validator("weight")
    @classmethod
    def _is_known(cls, value: float | None) -> float | None:
        if value not in (None, 0, 1):
            raise ValueError("a weight is 0 (not trained) or 1 (trained)")
        return value

    @field_validator("content", mode="plain")
    @classmethod
    def _read_content(cls, value: object) -> _Content | None:
        if value is None:
            return None
        if isinstance(value, str):
            return _Content(value)
        if not isinstance(value, list):
            raise ValueError("text or a list of parts is expected")
        return _join_parts(value)

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing; only an assistant that calls tools may omit it")
        if self.weight is not None and self.role != "assistant":
            raise ValueError("only an assistant's message has a weight; the others never train")
        if self.content and self.content.images and self.role in ("system", "developer"):
            raise ValueError("a system message cannot hold images")
        return self

    def to_message(self) -> Message:
        text, images = self.content or _Content("")
        reasoning = self.reasoning_content
        if self.role == "assistant" and reasoning is None and not images:
            reasoning, text = split_thinking(text)
        return Message(
            role=self.role,
            content=text,
            reasoning_content=reasoning,
            tool_calls=tuple(
                ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
                for call in self.tool_calls or ()
            ),
            tool_call_id=self.tool_call_id,
            name=self.name,
            weight=0 if self.weight == 0 else 1,
            images=images,
        )


def _join_parts(parts: list[object]) -> _Content:
    """Return text parts as one text, with the images at their places in it."""
    text = ""
    images = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, dict) and kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"part {index} has no text")
            text += part["text"]
        elif isinstance(part, dict) and kind in ("image_url", "image", "input_image"):
            ref = part.get("image_url", part.get("image"))
            ref = ref.get("url") if isinstance(ref, dict) else ref
            if not isinstance(ref, str) or not ref:
                raise ValueError(f"part {index} is an image without a reference")
            images.append(Image(at=len(text), ref=ref))
        else:
            raise ValueError(f"part {index} is of type {kind!r}; text and images are known")
    return _Content(text, tuple(images))


def split_thinking(text: str) -> tuple[str | None, str]:
    """Return the thinking that stands in `<think>` tags before an answer, and the answer.

    Where the tags do not open the text, or are not closed, it has no thinking and stays as it is.
    Line feeds around both are dropped, as the chat templates do that write them anew.
    """
    before, _, rest = text.partition("<think>")
    thinking, closing, answer = rest.partition("</think>")
    is_first = not before or before.isspace()
    if not (is_first and closing) or "<think>" in thinking or "</think>" in answer:
        return None, text
    return thinking.strip("\n"), answer.lstrip("\n")


class _OpenAIRecord(Section):
    model_config = ConfigDict(extra="ignore")

    messages: tuple[_OpenAIMessage, ...] = Field(min_length=1)
    tools: tuple[dict[str, Any], ...] | None = None


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
        raise RecordError(path_of(first["loc"]), first["input"], reason) from error
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
