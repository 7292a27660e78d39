"""Records as people and other programs write them: OpenAI messages, pairs of answers, texts."""

import json
from typing import Any

import msgspec

from studio.domain.conversation import Conversation, Kind, Message, PlainText, Record
from studio.domain.strict_json import RecordError, json_sentence, parse_json
from studio.intake.convert import convert
from studio.intake.formats import Format

_FORMATS = {
    Kind.CONVERSATIONS: Format.OPENAI,
    Kind.PREFERENCES: Format.PREFERENCE,
    Kind.TEXTS: Format.TEXT,
}


def to_openai(record: Record) -> dict[str, Any]:
    """Return a record as an object that the reader takes for the same record."""
    if isinstance(record, PlainText):
        values: dict[str, Any] = {"text": record.text}
    elif isinstance(record, Conversation):
        values = {"messages": _messages(record.messages)}
    else:
        values = {
            "prompt": _messages(record.messages),
            "chosen": _messages(record.chosen),
            "rejected": _messages(record.rejected),
        }
    if not isinstance(record, PlainText) and record.tools:
        values["tools"] = list(record.tools)
    return values


def to_line(record: Record) -> bytes:
    """Return a record as one line of such a file."""
    return msgspec.json.encode(to_openai(record)) + b"\n"


def to_text(record: Record) -> str:
    """Return a record as a person edits it."""
    return json.dumps(to_openai(record), ensure_ascii=False, indent=2)


def from_text(text: str, kind: Kind) -> Record:
    """Read what a person has edited.

    Raises:
        RecordError: It is not such a record; names the place and the reason.
    """
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise RecordError("", "", f"line {error.lineno} is {json_sentence(error)}") from error
    return convert(value, _FORMATS[kind], None)


def _messages(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    values: dict[str, Any] = {"role": message.role, "content": message.template_content()}
    if message.reasoning_content is not None:
        values["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        values["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for call in message.tool_calls
        ]
    for name in ("tool_call_id", "name"):
        if getattr(message, name) is not None:
            values[name] = getattr(message, name)
    if message.weight == 0:
        values["weight"] = 0
    return values
