"""Read one field of a record in a foreign format, with the sentence of what is wrong with it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from studio.domain.conversation import Message
from studio.domain.openai_messages import from_openai, split_thinking
from studio.domain.strict_json import RecordError, json_sentence, parse_json
from studio.intake.formats import REASONINGS, SYSTEMS


def only(value: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return which of some names a record has, the first where it has none of them."""
    return next((name for name in names if value.get(name) is not None), names[0])


def text_of(value: Mapping[str, Any], name: str) -> str:
    """Return a text.

    Raises:
        RecordError: It is missing or no text.
    """
    if name not in value:
        raise RecordError(name, sorted(map(str, value))[:8], "this field is missing")
    if not isinstance(value[name], str):
        raise RecordError(name, value[name], "text is expected")
    return str(value[name])


def question_of(value: Mapping[str, Any], name: str) -> str:
    """Return a text that is not empty."""
    text = text_of(value, name)
    if not text.strip():
        raise RecordError(name, text, "the question is empty")
    return text


def optional_text(value: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return a text, empty where the field is missing, null or blank."""
    name = only(value, names)
    if value.get(name) is None:
        return ""
    text = text_of(value, name)
    return text if text.strip() else ""


def list_of(value: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list, given as one or as JSON text of one.

    Raises:
        RecordError: It is missing or no list.
    """
    if name not in value:
        raise RecordError(name, sorted(map(str, value))[:8], "this field is missing")
    items = unpacked(value[name], name, "a list")
    if not isinstance(items, list):
        raise RecordError(name, items, "a list is expected")
    return items


def unpacked(value: object, path: str, expected: str = "") -> Any:
    """Return what JSON text holds, and anything else as it is.

    Args:
        value: A value of a record.
        path: Where it stands.
        expected: What is meant to stand there; a text that is not begun as JSON is not that.

    Raises:
        RecordError: The text is no JSON.
    """
    if not isinstance(value, str):
        return value
    if expected and not value.lstrip().startswith(("[", "{")):
        raise RecordError(path, value, f"{expected} is expected")
    try:
        return parse_json(value)
    except json.JSONDecodeError as error:
        raise RecordError(path, value, f"the text is {json_sentence(error)}") from error
    except RecordError as error:
        raise RecordError(joined(path, error.path), error.value, error.reason) from error


def joined(path: str, inner: str) -> str:
    """Return the path of something inside of what stands at another path."""
    return f"{path}.{inner}" if inner and not inner.startswith("[") else path + inner


def messages_of(items: object, path: str) -> tuple[Message, ...]:
    """Return messages as OpenAI writes them, that stand anywhere in a record."""
    try:
        return from_openai({"messages": items}).messages
    except RecordError as error:
        inner = error.path.removeprefix("messages")
        raise RecordError(joined(path, inner), error.value, error.reason) from error


def tools_of(value: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the schemas of the field `tools`: a list, JSON text of one, or a list of JSON texts.

    A bare schema is put into the `function` of a tool, as OpenAI and the chat templates have it.
    """
    tools = []
    if value.get("tools") in (None, "", []):
        return ()
    for index, item in enumerate(list_of(value, "tools")):
        tool = unpacked(item, f"tools[{index}]", "an object")
        if not isinstance(tool, dict):
            raise RecordError(f"tools[{index}]", tool, "an object is expected")
        is_bare = "name" in tool and "function" not in tool
        tools.append({"type": "function", "function": tool} if is_bare else tool)
    return tuple(tools)


def system_of(value: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the system message that a field of the record holds, if any."""
    text = optional_text(value, SYSTEMS)
    return (Message(role="system", content=text),) if text else ()


def answer_of(
    value: Mapping[str, Any], name: str, reasonings: Sequence[str] = REASONINGS
) -> Message:
    """Return the assistant's message of a field, with thinking from another field or its tags."""
    text = text_of(value, name)
    reasoning = optional_text(value, reasonings) if reasonings else ""
    return assistant(text, reasoning or None)


def assistant(text: str, reasoning: str | None = None) -> Message:
    """Return an assistant's message; thinking in tags is taken from the text if none is given."""
    if reasoning is None:
        reasoning, text = split_thinking(text)
    return Message(role="assistant", content=text, reasoning_content=reasoning)
