"""Render conversations with a model's own chat template, and find what is supervised.

Rendering follows transformers' `apply_chat_template` (transformers/utils/chat_template_utils.py:
sandboxed environment, trim_blocks, lstrip_blocks, loop controls, tojson without HTML escapes);
a test compares the text with transformers' for every template that the studio ships.

The supervised part of a reply is what the model must write at inference: everything after the
generation prompt up to and including the end-of-turn token. A template that rewrites history
(Qwen3.5 drops the thinking of earlier turns) gives one Rendering per user query, each with the
history exactly as at inference; a template that does not gives a single one.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from studio.domain.conversation import Conversation
from studio.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """Text of one training example.

    Attributes:
        spans: Supervised character ranges, start inclusive and end exclusive, ascending.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def render(
    template: str,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] = (),
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> str:
    """Render messages as the model reads them.

    Args:
        template: Jinja source of the model's chat template.
        messages: Messages in template form (`Conversation.template_messages`).
        tools: Function schemas offered to the model.
        add_generation_prompt: Whether to end with the header of the model's reply.
        enable_thinking: Passed on when not None; templates without thinking ignore it.

    Raises:
        InputError: The template is not valid or refuses the messages; its words are kept.
    """
    variables: dict[str, Any] = {
        "messages": list(messages),
        "tools": list(tools) or None,
        "add_generation_prompt": add_generation_prompt,
    }
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    try:
        return _compiled(template).render(**variables)
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"The model's chat template refuses the conversation: {error}.",
            "Correct the conversation, or choose a model whose template accepts it.",
        ) from error


def renderings(template: str, conversation: Conversation) -> Iterator[Rendering]:
    """Yield the training examples of one Conversation.

    Raises:
        InputError: The template refuses the Conversation.
    """
    messages = conversation.template_messages()
    tools = conversation.tools
    pending: Rendering | None = None
    for end, replies in _segments(messages):
        text = render(template, messages[:end], tools=tools)
        spans = tuple(_span(template, messages, tools, text, reply) for reply in replies)
        if pending is not None and text.startswith(pending.text):
            spans = pending.spans + spans
        elif pending is not None:
            yield pending
        pending = Rendering(text=text, spans=spans)
    if pending is not None:
        yield pending


def _segments(messages: Sequence[dict[str, Any]]) -> Iterator[tuple[int, list[int]]]:
    """Yield, for each user query, the end of its replies and the indices of them."""
    replies: list[int] = []
    end = 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            replies.append(index)
            end = index + 1
        elif message["role"] == "user" and replies:
            yield end, replies
            replies = []
    if replies:
        yield end, replies


def _span(
    template: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    text: str,
    reply: int,
) -> tuple[int, int]:
    prompts = [
        render(
            template,
            messages[:reply],
            tools=tools,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for thinking in (False, True)
    ]
    starts = [len(prompt) for prompt in prompts if text.startswith(prompt)]
    whole = render(template, messages[: reply + 1], tools=tools)
    if not starts or not text.startswith(whole.rstrip("\n")):
        raise InputError(
            f"The chat template writes reply {reply + 1} differently from its own generation "
            "prompt, so what the model must learn cannot be told apart.",
            "Use the template that was published with the model.",
        )
    return max(starts), len(whole.rstrip("\n"))


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
