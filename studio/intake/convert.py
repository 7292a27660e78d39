"""Convert a record of a known format into the one shape that it becomes.

A RecordError names the place in the record as the file has it, not in what it becomes.
"""

import json
from collections.abc import Callable
from collections.abc import Mapping as Values
from typing import Any

from studio.domain.conversation import Conversation, Message, PlainText, Record
from studio.domain.openai_messages import from_openai
from studio.domain.strict_json import RecordError
from studio.intake.fields import (
    answer_of,
    assistant,
    joined,
    list_of,
    messages_of,
    only,
    optional_text,
    question_of,
    system_of,
    text_of,
    tools_of,
    unpacked,
)
from studio.intake.formats import ANSWERS, CONTEXTS, QUESTIONS, Format, Mapping, format_of
from studio.intake.pictures import fill_parts, place_pictures
from studio.intake.preferences import from_preference
from studio.intake.sharegpt import from_sharegpt


def convert(value: object, format: Format, mapping: Mapping | None = None) -> Record:
    """Convert one record.

    Args:
        value: A parsed JSON value, or the cells of a row by the names of the columns.
        format: The format of the file; a record of another one is refused.
        mapping: What the columns hold, for COLUMNS.

    Raises:
        RecordError: Names the first wrong place, what stands there and what is expected.
        ValueError: COLUMNS without a Mapping.
    """
    if not isinstance(value, dict):
        raise RecordError("", value, "a record is an object with named fields")
    if format is Format.COLUMNS:
        if mapping is None:
            raise ValueError("columns need a Mapping")
        return _from_columns(value, mapping)
    found = format_of(value)
    if found is not None and found is not format:
        raise RecordError(
            "",
            ", ".join(sorted(map(str, value))[:8]),
            f"the record is in another format ({found.title}) than the file ({format.title}); "
            "put it into a file of its own",
        )
    return _CONVERTERS[format](value)


def _from_openai(value: dict[str, Any]) -> Conversation:
    values = {**value, "messages": unpacked(value.get("messages"), "messages", "a list")}
    if "messages" not in value:
        del values["messages"]
    if isinstance(value.get("tools"), str):
        values["tools"] = unpacked(value["tools"], "tools", "a list") if value["tools"] else None
    if isinstance(values.get("messages"), list):
        values["messages"] = fill_parts(value, list(map(_nested_calls, values["messages"])))
    return from_openai(values)


def _nested_calls(message: object) -> object:
    """Put calls of the form {name, arguments} into a `function`, as OpenAI has it."""
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(calls, list):
        return message
    return {**message, "tool_calls": list(map(_nested_call, calls))}


def _nested_call(call: object) -> object:
    if not isinstance(call, dict) or "function" in call or "name" not in call:
        return call
    outside = {key: field for key, field in call.items() if key in ("id", "type")}
    inside = {key: field for key, field in call.items() if key not in outside}
    return {**outside, "function": inside}


def _from_alpaca(value: dict[str, Any]) -> Conversation:
    # The order and line feed are LLaMA-Factory's, which reads most Alpaca files:
    # https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
    instruction = text_of(value, "instruction")
    context = optional_text(value, CONTEXTS)
    question = "\n".join(text for text in (instruction, context) if text.strip())
    if not question:
        raise RecordError("instruction", instruction, "the question is empty")
    messages = (
        *system_of(value),
        *_history(value),
        Message(role="user", content=question),
        answer_of(value, only(value, ANSWERS)),
    )
    return Conversation(messages=place_pictures(value, messages))


def _history(value: dict[str, Any]) -> list[Message]:
    """Return the turns before the last one: a list of pairs, question and answer."""
    if value.get("history") in (None, "", []):
        return []
    messages = []
    for index, pair in enumerate(list_of(value, "history")):
        path = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(path, pair, "a list of question and answer is expected")
        for place, text in enumerate(pair):
            if not isinstance(text, str):
                raise RecordError(f"{path}[{place}]", text, "text is expected")
        messages += [Message(role="user", content=pair[0]), assistant(pair[1])]
    return messages


def _from_prompt(value: dict[str, Any]) -> Conversation:
    question, answer = only(value, QUESTIONS), only(value, ANSWERS)
    messages = (
        *system_of(value),
        *_prompt(value, question),
        *_completion(value, answer),
    )
    return Conversation(messages=place_pictures(value, messages), tools=tools_of(value))


def _prompt(value: dict[str, Any], name: str) -> tuple[Message, ...]:
    if isinstance(value.get(name), list):
        return messages_of(value[name], name)
    context = optional_text(value, ("context",))
    question = question_of(value, name)
    return (Message(role="user", content=f"{question}\n{context}" if context else question),)


def _completion(value: dict[str, Any], name: str) -> tuple[Message, ...]:
    answer = value.get(name)
    if isinstance(answer, list):
        return messages_of(answer, name)
    if isinstance(answer, dict):
        return _one_message(answer, name)
    return (answer_of(value, name),)


def _one_message(message: dict[str, Any], name: str) -> tuple[Message, ...]:
    try:
        return messages_of([message], name)
    except RecordError as error:
        inner = error.path.removeprefix(f"{name}[0]").removeprefix(".")
        raise RecordError(joined(name, inner), error.value, error.reason) from error


def _from_text(value: dict[str, Any]) -> PlainText:
    return PlainText(text=text_of(value, "text"))


def _from_columns(value: dict[str, Any], mapping: Mapping) -> Record:
    cells = {name: _cell(value, name) for name in mapping.columns}
    if mapping.text:
        return PlainText(text=text_of(cells, mapping.text))
    system = optional_text(cells, (mapping.system,))
    messages = (
        *((Message(role="system", content=system),) if system else ()),
        Message(role="user", content=question_of(cells, mapping.user)),
        answer_of(cells, mapping.assistant, (mapping.reasoning,)),
    )
    return Conversation(messages=messages)


def _cell(value: Values[str, Any], name: str) -> object:
    """Return a cell; a number is text as JSON writes it, since a table of text has no other."""
    if name not in value:
        raise RecordError(name, sorted(map(str, value))[:8], "this column is missing")
    cell = value[name]
    return json.dumps(cell) if isinstance(cell, bool | int | float) else cell


_CONVERTERS: Values[Format, Callable[[dict[str, Any]], Record]] = {
    Format.OPENAI: _from_openai,
    Format.SHAREGPT: from_sharegpt,
    Format.ALPACA: _from_alpaca,
    Format.PROMPT_COMPLETION: _from_prompt,
    Format.PREFERENCE: from_preference,
    Format.TEXT: _from_text,
}
