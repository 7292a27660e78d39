"""Read preference pairs: OpenAI's, and those of TRL with and without a prompt of their own.

https://platform.openai.com/docs/guides/direct-preference-optimization
https://huggingface.co/docs/trl/dataset_formats#preference
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from studio.domain.conversation import Message, Preference, Role
from studio.domain.strict_json import RecordError
from studio.intake.fields import (
    assistant,
    joined,
    list_of,
    messages_of,
    question_of,
    system_of,
    text_of,
    tools_of,
)
from studio.intake.formats import PREFERRED
from studio.intake.pictures import pictures_of

# Anthropic's hh-rlhf, https://huggingface.co/datasets/Anthropic/hh-rlhf
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def from_preference(value: dict[str, Any]) -> Preference:
    """Convert one record.

    Raises:
        RecordError: Names the first wrong place, as in `preferred_output[0].content`.
    """
    name, pictures = pictures_of(value)
    if pictures:
        raise RecordError(name, len(pictures), "pictures in preference pairs are not read")
    if "chosen" not in value or "rejected" not in value:
        return _from_openai(value)
    chosen, rejected = _answer(value, "chosen"), _answer(value, "rejected")
    if chosen[0].role == rejected[0].role == "assistant":
        prompt = _prompt(value)
    else:
        prompt = _common(value, chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return _preference((*system_of(value), *prompt), chosen, rejected, tools_of(value))


def _preference(
    prompt: tuple[Message, ...],
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    tools: tuple[dict[str, Any], ...],
) -> Preference:
    return Preference(messages=prompt, chosen=chosen, rejected=rejected, tools=tools)


def _from_openai(value: dict[str, Any]) -> Preference:
    given = value.get("input")
    if isinstance(given, list | str):
        prompt = messages_of(list_of(value, "input"), "input")
        tools = tools_of(value)
    elif isinstance(given, dict):
        try:
            prompt, tools = messages_of(list_of(given, "messages"), "messages"), tools_of(given)
        except RecordError as error:
            raise RecordError(joined("input", error.path), error.value, error.reason) from error
    else:
        raise RecordError("input", given, "an object with a list `messages` is expected")
    chosen, rejected = (messages_of(list_of(value, name), name) for name in PREFERRED)
    return _preference(prompt, chosen, rejected, tools)


def _answer(value: dict[str, Any], name: str) -> tuple[Message, ...]:
    """Return what a field holds: messages, a transcript, or the text of an answer."""
    answer = value[name]
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list):
        return messages_of(answer, name)
    text = text_of(value, name)
    return _transcript(text, name) if _SPEAKER.match(text) else (assistant(text),)


def _transcript(text: str, name: str) -> tuple[Message, ...]:
    """Return the messages of a text in which `Human:` and `Assistant:` take turns."""
    _, *pieces = _SPEAKER.split(text)
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    messages = tuple(
        Message(role=roles[speaker], content=said.strip())
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    )
    if messages[-1].role != "assistant":
        raise RecordError(name, text[-80:], "the text ends without an answer of the assistant")
    return messages


def _prompt(value: dict[str, Any]) -> tuple[Message, ...]:
    """Return what was asked: `prompt` as messages or text, or `messages`."""
    if value.get("prompt") is None and value.get("messages") is None:
        raise RecordError("prompt", sorted(map(str, value))[:8], "the question is missing")
    if value.get("prompt") is None:
        return messages_of(list_of(value, "messages"), "messages")
    if isinstance(value["prompt"], list):
        return messages_of(value["prompt"], "prompt")
    text = question_of(value, "prompt")
    if _SPEAKER.match(text):
        return messages_of(_dialogue(text), "prompt")
    return (Message(role="user", content=text),)


def _dialogue(text: str) -> list[dict[str, str]]:
    _, *pieces = _SPEAKER.split(text)
    pairs = list(zip(pieces[::2], pieces[1::2], strict=True))
    if pairs[-1] == ("Assistant", ""):
        del pairs[-1]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[speaker], "content": said.strip()} for speaker, said in pairs]


def _common(
    value: dict[str, Any], chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[Message, ...]:
    """Return the messages that both continuations begin with.

    Raises:
        RecordError: They answer different questions, or are the same.
    """
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    prompt = tuple(message for message, _ in pairs)
    at = len(prompt)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if at == len(messages):
            reason = "nothing is left of this answer without what both begin with"
            raise RecordError(name, len(messages), reason)
        if messages[at].role != "assistant":
            reason = "the two answers belong to different questions"
            raise RecordError(f"{name}[{at}].content", messages[at].content, reason)
    asked = value.get("prompt")
    if isinstance(asked, str) and not any(m.content.strip() == asked.strip() for m in prompt):
        reason = "the prompt is another than the question in chosen and rejected"
        raise RecordError("prompt", asked, reason)
    return prompt
