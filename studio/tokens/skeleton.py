"""Renderings of conversations by their shape: the same as chat_template's, many times faster.

What a chat template writes for most conversations is always the same but for the texts in it. So the
first conversations of a shape (roles, thinking, calls) are rendered by Jinja with Traced texts, which
gives a program that writes the next ones of that shape without Jinja. Spans, turns and conditions
come from chat_template's own code, run on those texts.

A program is believed only where nothing can have escaped it: the template uses no construct that could
look into a text unseen (studio/tokens/follow.py), no value was copied outside of a hole (MARK is searched for),
every guard gives the answer that it gave then, and the first conversation comes out as Jinja has it.
All else, and shapes that are seen once, is rendered by Jinja.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError

from studio.domain.chat_template import (
    Draft,
    Rendering,
    Values,
    drafts,
    readable,
    renderings,
    turn_starts,
)
from studio.domain.conversation import Conversation
from studio.domain.reading import Reading
from studio.errors import InputError
from studio.tokens.follow import compiled, why_not_followed
from studio.tokens.trace import NotSeparable, Piece, Trace
from studio.tokens.traced import MARK, Opaque, Traced, pieces_of

_MAX_SHAPES = 4096
_MAX_PROGRAMS = 24
_MAX_MESSAGES = 256
_CONTROL = "<|im_"
_ROLE_END = re.compile("<\\|im_start\\|>\\w*\0")
# A text that ends or begins like this could make a control token together with its neighbour.
_CONTROL_STARTS = tuple("<|im_start|>"[:end] for end in range(1, 6))
_CONTROL_RESTS = ("|im_", "im_start|>", "im_end|>", "m_start|>", "m_end|>", "_start|>", "_end|>")

Shape = tuple[Any, ...]
# Values before a place that are the first ones of the text, characters of literals before it, and
# other values before it, which under the guards are as long as what the text has there.
Place = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """How one Rendering is written.

    Attributes:
        literals: Its literals, with an empty text where each value stands.
        holes: Where each value stands among them, and its number.
        spans: Places of starts and ends.
    """

    literals: tuple[str, ...]
    holes: tuple[tuple[int, int], ...]
    spans: tuple[tuple[Place, Place], ...]
    turns: tuple[Place, ...]
    unwritten: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Program:
    steps: tuple[tuple[Callable[[Any], Any], int, bool, Any], ...]
    texts: tuple[_Text, ...]

    def run(self, inputs: Sequence[Any]) -> list[Rendering] | None:
        """Return the renderings of a conversation; None where a guard fails."""
        values = list(inputs)
        for action, source, is_guard, expected in self.steps:
            made = action(values if source < 0 else values[source])
            if not is_guard:
                values.append(made)
            elif made != expected:
                return None
        found = []
        for text in self.texts:
            parts: list[Any] = [*text.literals]
            lengths, length = [0], 0
            for place, hole in text.holes:
                value = values[hole]
                if _CONTROL in value:
                    return None
                parts[place] = value
                length += len(value)
                lengths.append(length)
            at = partial(_count, lengths, values)
            found.append(
                Rendering(
                    text="".join(parts),
                    spans=tuple([(at(start), at(end)) for start, end in text.spans]),
                    turns=tuple([at(turn) for turn in text.turns]),
                    unwritten=text.unwritten,
                )
            )
        return found


def _count(lengths: Sequence[int], values: Sequence[Any], place: Place) -> int:
    holes, literals, others = place
    return lengths[holes] + literals + sum([len(values[hole]) for hole in others])


class Skeletons:
    """Renders conversations as chat_template.renderings does.

    Args:
        template: Jinja source of the chat template.
        reading: What is learned of the thinking.

    Attributes:
        why_plain: Why every conversation is rendered by Jinja, empty where not.
        num_plain: Conversations that Jinja rendered so far.
    """

    def __init__(self, template: str, reading: Reading = Reading()) -> None:
        self.template = template
        self.reading = reading
        self.why_plain = why_not_followed(template)
        self.num_plain = 0
        # None: seen once. Newest last; the one that was not seen for the longest time goes first.
        self._shapes: OrderedDict[Shape, list[_Program] | None] = OrderedDict()

    def renderings(self, conversation: Conversation) -> list[Rendering]:
        """Return the training examples of one Conversation; none where nothing is supervised.

        Raises:
            InputError: The template refuses the Conversation.
        """
        known = None if self.why_plain else self._by_shape(conversation)
        if known is not None:
            return known
        self.num_plain += 1
        return list(renderings(self.template, conversation, self.reading))

    def _by_shape(self, conversation: Conversation) -> list[Rendering] | None:
        seen = _shape(conversation, is_strip=self.reading.thinking == "strip")
        if seen is None:
            return None
        shape, inputs = seen
        if shape not in self._shapes:
            self._shapes[shape] = None
            if len(self._shapes) > _MAX_SHAPES:
                self._shapes.popitem(last=False)
            return None
        self._shapes.move_to_end(shape)
        programs = self._shapes[shape]
        if programs is None:
            programs = self._shapes[shape] = []
        for index, program in enumerate(programs):
            found = program.run(inputs)
            if found is not None:
                if index:
                    programs.insert(0, programs.pop(index))
                return found
        if len(programs) < _MAX_PROGRAMS:
            return self._learn(conversation, inputs, programs)
        return None

    def _learn(
        self, conversation: Conversation, inputs: Sequence[Any], programs: list[_Program]
    ) -> list[Rendering] | None:
        """Add a program for a conversation, and return what it gives."""
        plain = list(renderings(self.template, conversation, self.reading))
        try:
            program = _trace(self.template, conversation, inputs, self.reading)
        except (NotSeparable, InputError):
            # Runs on nothing, so that a shape that cannot be followed is not tried for ever.
            program = _NOTHING
        if program is not _NOTHING and program.run(inputs) not in (plain, None):
            self.why_plain = "the template writes something else than was followed."
        elif not self.why_plain:
            programs.append(program)
        self.num_plain += 1
        return plain


def _refuse_all(_value: object) -> bool:
    return False


_NOTHING = _Program(steps=((_refuse_all, -1, True, True),), texts=())


# ---- shapes -----------------------------------------------------------------------------------


def _shape(conversation: Conversation, *, is_strip: bool) -> tuple[Shape, list[Any]] | None:
    """Return what decides the course of a template, and what is written into its holes.

    None where a conversation is not one that is followed: images, and tool results in the words of
    a user, which decide where turns begin.
    """
    shape: list[Any] = [len(conversation.tools)]
    inputs: list[Any] = []
    if len(conversation.messages) > _MAX_MESSAGES:
        return None
    for message in conversation.messages:
        role, calls = message.role, message.tool_calls
        content, reasoning = message.content, message.reasoning_content
        if message.images or (role != "assistant" and "<tool_response>" in content):
            return None
        if is_strip and role == "assistant":
            if "</think>" in content:
                return None
            reasoning = None
        inputs.append(content)
        if reasoning is not None:
            inputs.append(reasoning)
        for call in calls:
            inputs += (call.name, call.arguments)
        shape.append((role, reasoning is None, message.weight, len(calls)))
    inputs += conversation.tools
    return tuple(shape), inputs


def _traced(
    messages: Sequence[Values], num_tools: int, trace: Trace
) -> tuple[list[Values], list[Any]]:
    """Return messages and tools with a Traced text or an Opaque value for each input, in order."""
    numbers = iter(range(len(trace.values)))

    def text(_value: str) -> Traced:
        return Traced(trace, (next(numbers),))

    traced = []
    for message in messages:
        new = {**message, "content": text(message["content"])}
        if "reasoning_content" in message:
            new["reasoning_content"] = text(message["reasoning_content"])
        if "tool_calls" in message:
            new["tool_calls"] = [
                {
                    **call,
                    "function": {
                        "name": text(call["function"]["name"]),
                        "arguments": Opaque(trace, next(numbers)),
                    },
                }
                for call in message["tool_calls"]
            ]
        traced.append(new)
    return traced, [Opaque(trace, next(numbers)) for _ in range(num_tools)]


def _trace(
    template: str, conversation: Conversation, inputs: Sequence[Any], reading: Reading
) -> _Program:
    """Follow a template through a conversation.

    Raises:
        NotSeparable: It did something with a text that cannot be followed.
        InputError: It refuses the conversation.
    """
    trace = Trace(inputs)
    real, replies = readable(conversation, reading)
    messages, tools = _traced(real, len(conversation.tools), trace)
    followed = compiled(template)

    def draw(part: Sequence[Values], thinks: bool | None) -> str:
        variables: Values = {"messages": list(part), "tools": list(tools) or None}
        variables["add_generation_prompt"] = thinks is not None
        if thinks is not None:
            variables["enable_thinking"] = thinks
        try:
            return followed.render(**variables)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise NotSeparable(str(error)) from error

    texts = tuple(_text(draft) for draft in drafts(draw, messages, replies, reading))
    if trace.fault:
        raise NotSeparable(trace.fault)
    return _Program(steps=tuple(trace.steps), texts=texts)


def _text(draft: Draft) -> _Text:
    pieces = pieces_of(draft.text)
    _check_borders(pieces)
    holes = tuple(piece for piece in pieces if isinstance(piece, int))
    shadow = "".join(piece if isinstance(piece, str) else "\0" for piece in pieces)
    if _ROLE_END.search(shadow) or shadow.count("\0") != len(holes):
        raise NotSeparable("a text stands where a role ends")
    turns = []
    for at in turn_starts(shadow):
        before = shadow.count("\0", 0, at)
        turns.append((before, at - before, ()))
    return _Text(
        literals=tuple(piece if isinstance(piece, str) else "" for piece in pieces),
        holes=tuple((at, piece) for at, piece in enumerate(pieces) if isinstance(piece, int)),
        spans=tuple((_place(start, holes), _place(end, holes)) for start, end in draft.spans),
        turns=tuple(turns),
        unwritten=draft.unwritten,
    )


def _place(prefix: str, holes: tuple[int, ...]) -> Place:
    pieces = pieces_of(prefix)
    before = tuple(piece for piece in pieces if isinstance(piece, int))
    same = 0
    while same < min(len(before), len(holes)) and before[same] == holes[same]:
        same += 1
    length = sum(len(piece) for piece in pieces if isinstance(piece, str))
    return same, length, before[same:]


def _check_borders(pieces: Sequence[Piece]) -> None:
    """Refuse texts in which a value was copied unseen, or could make a control token."""
    before: Piece = ""
    for piece in pieces:
        if isinstance(piece, str):
            if MARK in piece:
                raise NotSeparable("a text was copied unseen")
            if isinstance(before, int) and piece.startswith(_CONTROL_RESTS):
                raise NotSeparable("a text stands inside a control token")
        elif isinstance(before, int) or before.endswith(_CONTROL_STARTS):
            raise NotSeparable("a text stands beside a control token or another text")
        before = piece
