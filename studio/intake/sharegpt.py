"""Read ShareGPT: a list `conversations` of `from` and `value`.

The names are those of LLaMA-Factory, which reads most of these files, and of the first data sets:
https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from typing import Any

from studio.domain.conversation import Conversation, Message, Role, ToolCall
from studio.domain.openai_messages import split_thinking
from studio.domain.strict_json import RecordError
from studio.intake.fields import (
    assistant,
    joined,
    list_of,
    messages_of,
    only,
    system_of,
    text_of,
    tools_of,
    unpacked,
)
from studio.intake.formats import TURNS
from studio.intake.pictures import place_pictures

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CALLS = ("function_call", "tool_call")


def from_sharegpt(value: dict[str, Any]) -> Conversation:
    """Convert one record.

    Raises:
        RecordError: Names the first wrong place, as in `conversations[2].from`.
    """
    name = only(value, TURNS)
    turns = list_of(value, name)
    if not turns:
        raise RecordError(name, turns, "at least one entry is expected")
    # Some files have OpenAI's names under ShareGPT's list.
    if any(isinstance(turn, dict) and "from" in turn for turn in turns):
        messages = tuple(_message(turn, f"{name}[{index}]") for index, turn in enumerate(turns))
    else:
        messages = messages_of([_renamed(turn) for turn in turns], name)
    system = system_of(value)
    if system and messages[0].role == "system":
        reason = "a system message stands here and in the list, too"
        raise RecordError("system", value.get("system"), reason)
    return Conversation(messages=place_pictures(value, (*system, *messages)), tools=tools_of(value))


def _renamed(turn: object) -> object:
    role = turn.get("role") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or not isinstance(role, str):
        return turn
    return {**turn, "role": _ROLES.get(role, role)}


def _message(turn: object, path: str) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(path, turn, "an object with `from` and `value` is expected")
    try:
        sender, text = text_of(turn, "from"), text_of(turn, "value")
    except RecordError as error:
        raise RecordError(joined(path, error.path), error.value, error.reason) from error
    if sender in _CALLS:
        return _calling(text, f"{path}.value")
    role = _ROLES.get(sender)
    if role is None:
        names = ", ".join((*_ROLES, *_CALLS))
        raise RecordError(f"{path}.from", sender, f"nobody of this name is known; known: {names}")
    weight = _weight(turn, path, role)
    if role != "assistant":
        return Message(role=role, content=text)
    message = assistant(text)
    return (
        message
        if weight
        else Message(
            role=role,
            content=message.content,
            reasoning_content=message.reasoning_content,
            weight=0,
        )
    )


def _weight(turn: dict[str, Any], path: str, role: Role) -> int:
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise RecordError(f"{path}.weight", weight, "a weight is 0 (not trained) or 1 (trained)")
    if weight is not None and role != "assistant":
        reason = "only an assistant's message has a weight; the others never train"
        raise RecordError(f"{path}.weight", weight, reason)
    return 1 if weight is None else int(weight)


def _calling(text: str, path: str) -> Message:
    """Return the message of one call, or of several in a JSON list."""
    reasoning, text = split_thinking(text)
    calls = unpacked(text, path)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise RecordError(path, text, "a call is expected")
    return Message(
        role="assistant",
        reasoning_content=reasoning,
        tool_calls=tuple(_call(call, path) for call in calls),
    )


def _call(call: object, path: str) -> ToolCall:
    if not isinstance(call, dict):
        raise RecordError(path, call, "a call is an object with `name` and `arguments`")
    name = call.get("name")
    if not isinstance(name, str) or not name:
        raise RecordError(f"{path}.name", name, "the name of a function is expected")
    arguments = unpacked(call.get("arguments") or {}, f"{path}.arguments")
    if not isinstance(arguments, dict):
        raise RecordError(f"{path}.arguments", arguments, "an object is expected")
    return ToolCall(name=name, arguments=arguments)
