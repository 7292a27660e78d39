"""Render conversations with a model's own chat template, and find what is supervised.

Rendering follows transformers' `apply_chat_template` (transformers/utils/chat_template_utils.py:
sandboxed environment, trim_blocks, lstrip_blocks, loop controls, tojson without HTML escapes);
a test compares the text with transformers' for every template that the studio ships.

The supervised part of a reply is what the model must write at inference: everything after the
generation prompt up to and including the end-of-turn token; a Reading moves its start. A template
that rewrites history (Qwen3.5 drops the thinking of earlier turns) gives one Rendering per user
query, each with the history exactly as at inference; a template that does not gives a single one.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NoReturn

import msgspec
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from studio.domain.conversation import Conversation, Message
from studio.domain.reading import Reading
from studio.errors import InputError

THINK, THINK_END = "<think>", "</think>"
# How the families write the end of a think block; what the prompt opened may be empty.
_CLOSE = f"\n{THINK_END}\n\n"
_BLOCK = re.compile(r"<\|im_start\|>(\w+)(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
# A template is a program, and these are what a program of this kind fails with.
_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
)

Values = dict[str, Any]
# Renders messages; with None as they are, else with a generation prompt that thinks or does not.
Draw = Callable[[Sequence[Values], bool | None], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """Text of one training example.

    Attributes:
        spans: Supervised character ranges, start inclusive and end exclusive, ascending.
        turns: Where each user turn that starts an exchange begins; what stands before the first
            is the system message and the tools. Empty where the text is not ChatML.
        unwritten: Supervised replies whose thinking the template leaves out.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    turns: tuple[int, ...] = ()
    unwritten: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A Rendering before its places are counted.

    Attributes:
        spans: The text up to the start, and up to the end, of each supervised range.
    """

    text: str
    spans: tuple[tuple[str, str], ...]
    unwritten: int


def render(
    template: str,
    messages: Sequence[Values],
    *,
    tools: Sequence[Values] = (),
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
    variables: Values = {
        "messages": list(messages),
        "tools": list(tools) or None,
        "add_generation_prompt": add_generation_prompt,
    }
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    try:
        return _compiled(template).render(**variables)
    except _FAULTS as error:
        raise InputError(
            f"The model's chat template refuses the conversation: {error}.",
            "Correct the conversation, or choose a model whose template accepts it.",
        ) from error


def renderings(
    template: str, conversation: Conversation, reading: Reading = Reading()
) -> Iterator[Rendering]:
    """Yield the training examples of one Conversation; none where nothing is supervised.

    Raises:
        InputError: The template refuses the Conversation.
    """
    draw = partial(_draw, template, conversation.tools)
    messages, replies = readable(conversation, reading)
    found = list(drafts(draw, messages, replies, reading))
    for draft, plain in zip(
        found, _plain_texts(template, conversation, reading, found), strict=True
    ):
        yield Rendering(
            text=draft.text,
            spans=tuple((len(start), len(end)) for start, end in draft.spans),
            turns=tuple(turn_starts(plain)),
            unwritten=draft.unwritten,
        )


def readable(conversation: Conversation, reading: Reading) -> tuple[list[Values], list[int]]:
    """Return the messages as a template reads them, and the places of the supervised replies."""
    if reading.thinking == "strip":
        messages = tuple(_without_thinking(message) for message in conversation.messages)
        conversation = msgspec.structs.replace(conversation, messages=messages)
    replies = [
        index
        for index, message in enumerate(conversation.messages)
        if message.role == "assistant" and message.weight
    ]
    return conversation.template_messages(), replies


def drafts(
    draw: Draw, messages: Sequence[Values], replies: Sequence[int], reading: Reading
) -> Iterator[Draft]:
    """Yield the training examples of messages.

    Texts are only compared, joined and cut at their ends, so that `draw` may give any object that
    can do these as a text does.

    Args:
        draw: Renders messages.
        messages: Messages in template form.
        replies: Places of the supervised replies in them, ascending.
        reading: What is learned of the thinking.

    Raises:
        InputError: The template writes a reply unlike its own generation prompt.
    """
    pending: Draft | None = None
    for reply in replies:
        text = draw(messages[: reply + 1], None)
        start, is_unwritten = _start(draw, messages, reply, text, reading)
        spans: tuple[tuple[str, str], ...] = ((start, text.rstrip("\n")),)
        unwritten = int(is_unwritten)
        if pending is not None and text.startswith(pending.text):
            spans = pending.spans + spans
            unwritten += pending.unwritten
        elif pending is not None:
            yield pending
        pending = Draft(text=text, spans=spans, unwritten=unwritten)
    if pending is not None:
        yield pending


def turn_starts(text: str) -> Iterator[int]:
    """Yield where the user turns of a ChatML text begin that open the text or follow a reply.

    Tool results stand in turns of the user, too; they belong to the exchange that they are in.
    """
    before = ""
    for block in _BLOCK.finditer(text):
        role, content = block[1], block[2].strip()
        is_result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if role == "user" and before != "user" and not is_result:
            yield block.start()
        before = role


def _draw(
    template: str, tools: Sequence[Values], messages: Sequence[Values], thinks: bool | None
) -> str:
    return render(
        template,
        messages,
        tools=tools,
        add_generation_prompt=thinks is not None,
        enable_thinking=thinks,
    )


def _plain_texts(
    template: str, conversation: Conversation, reading: Reading, found: Sequence[Draft]
) -> list[str]:
    """Return the texts with every control token that a message itself holds made harmless."""
    texts = [draft.text for draft in found]
    line = conversation.to_line()
    if b"<|im_" not in line:
        return texts
    harmless = Conversation.from_json(line.replace(b"<|im_", b"<|im."))
    draw = partial(_draw, template, harmless.tools)
    plain = [draft.text for draft in drafts(draw, *readable(harmless, reading), reading)]
    # A template that looks at these tokens itself may write something else.
    is_same = [len(text) for text in plain] == [len(text) for text in texts]
    return plain if is_same else texts


def _without_thinking(message: Message) -> Message:
    """Return a reply without what it thinks, in whichever way it is written."""
    if message.role != "assistant":
        return message
    content = message.content.rpartition(THINK_END)[2]
    if content != message.content:
        content = content.lstrip("\n")
    cut = len(message.content) - len(content)
    images = tuple(
        msgspec.structs.replace(image, at=max(0, image.at - cut)) for image in message.images
    )
    return msgspec.structs.replace(message, content=content, reasoning_content=None, images=images)


# ---- where a reply begins to be learned -------------------------------------------------------


def _start(
    draw: Draw, messages: Sequence[Values], reply: int, text: str, reading: Reading
) -> tuple[str, bool]:
    """Return the text before what a reply must learn, and whether its thinking is left out."""
    prompts = [draw(messages[:reply], thinks) for thinks in (True, False)]
    prompts = [prompt for prompt in prompts if text.startswith(prompt)]
    if not prompts:
        raise InputError(
            f"The chat template writes reply {reply + 1} differently from its own generation "
            "prompt, so what the model must learn cannot be told apart.",
            "Use the template that was published with the model.",
        )
    longest = prompts[-1] if prompts[-1].startswith(prompts[0]) else prompts[0]
    reasoning, content = messages[reply].get("reasoning_content"), messages[reply]["content"]
    if reasoning is not None and reasoning.strip():
        return _start_of_thinker(draw, messages, reply, (text, longest), reading)
    if isinstance(content, str) and THINK_END in content and reasoning is None:
        is_masked = reading.thinking == "mask"
        return (_after_first_block(text, longest) if is_masked else longest), False
    if reading.empty_think == "train":
        return prompts[0], False
    return _after_blank(text, longest, reasoning or ""), False


def _start_of_thinker(
    draw: Draw,
    messages: Sequence[Values],
    reply: int,
    written: tuple[str, str],
    reading: Reading,
) -> tuple[str, bool]:
    text, prompt = written
    reasoning = messages[reply]["reasoning_content"]
    for thought in (reasoning.strip(), reasoning.strip("\n"), reasoning):
        for opening in ("", f"{THINK}\n"):
            end = prompt + opening + thought + _CLOSE
            if text.startswith(end):
                return (end if reading.thinking == "mask" else prompt), False
    changed = {**messages[reply], "reasoning_content": reasoning + "."}
    if draw([*messages[:reply], changed], None) == text:
        return prompt, True
    is_masked = reading.thinking == "mask"
    return (_after_first_block(text, prompt) if is_masked else prompt), False


def _after_blank(text: str, prompt: str, reasoning: str) -> str:
    """Return a text up to the end of the think block without a thought after the prompt, if any."""
    for blank in ("", reasoning.strip("\n"), reasoning):
        for opening in (f"{THINK}\n", ""):
            end = prompt + opening + blank + _CLOSE
            if text.startswith(end):
                return end
    return prompt


def _after_first_block(text: str, prompt: str) -> str:
    """Return a text up to the end of the first think block after the prompt, if there is one."""
    end = text.find(THINK_END, len(prompt))
    if end < 0:
        return prompt
    end += len(THINK_END)
    return text[: len(text) - len(text[end:].lstrip("\n"))]


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    return make_environment(ImmutableSandboxedEnvironment).from_string(template)


def make_environment(kind: type[ImmutableSandboxedEnvironment]) -> ImmutableSandboxedEnvironment:
    """Return an environment as transformers makes it, of a kind."""
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON, as the filter of that name in transformers does."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
