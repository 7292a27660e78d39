"""What is what in the text that a model reads: for the inspector."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

SpanKind = Literal[
    "header", "system", "user", "tool_result", "think", "answer", "tool_call", "text"
]
# ChatML: https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
_TURN = re.compile(
    r"(?P<head><\|im_start\|>(?P<role>[^\n]*)\n?)(?P<content>.*?)(?P<end><\|im_end\|>\n?|\Z)",
    re.DOTALL,
)
_RESULT = re.compile(r"<tool_response>.*?(?:</tool_response>|\Z)\n*", re.DOTALL)
# Two line feeds end a block in both families; more belong to the answer.
_THINK = re.compile(r"<think>.*?(?:</think>|\Z)\n{0,2}", re.DOTALL)
_CALL = re.compile(r"<tool_call>.*?(?:</tool_call>|\Z)\n*", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A range of characters, start inclusive and end exclusive.

    Attributes:
        kind: `header` are the marks at both ends of a turn, `text` is what is no turn at all.
    """

    start: int
    end: int
    kind: SpanKind


def parts(text: str) -> list[Span]:
    """Return what the parts of a text are; together they cover it, in order.

    A text that is not ChatML is one part, `text`; so is what stands between turns.
    """
    return [span for span in _parts(text) if span.start < span.end]


def _parts(text: str) -> Iterator[Span]:
    at = 0
    for turn in _TURN.finditer(text):
        yield Span(start=at, end=turn.start(), kind="text")
        yield Span(start=turn.start("head"), end=turn.end("head"), kind="header")
        yield from _inside(turn["role"], turn["content"], turn.start("content"))
        yield Span(start=turn.start("end"), end=turn.end("end"), kind="header")
        at = turn.end()
    yield Span(start=at, end=len(text), kind="text")


def _inside(role: str, content: str, start: int) -> Iterator[Span]:
    end = start + len(content)
    if role == "assistant":
        yield from _reply(content, start)
    elif role == "user" and content.lstrip().startswith("<tool_response>"):
        yield from _cut(content, start, _RESULT, "tool_result", "user")
    elif role in ("tool", "ipython", "function"):
        yield Span(start=start, end=end, kind="tool_result")
    else:
        yield Span(start=start, end=end, kind="user" if role == "user" else "system")


def _reply(content: str, start: int) -> Iterator[Span]:
    thinking = _THINK.match(content)
    end = thinking.end() if thinking else 0
    yield Span(start=start, end=start + end, kind="think")
    yield from _cut(content[end:], start + end, _CALL, "tool_call", "answer")


def _cut(
    content: str, start: int, pattern: re.Pattern[str], kind: SpanKind, other: SpanKind
) -> Iterator[Span]:
    at = 0
    for found in pattern.finditer(content):
        # White space that the template writes between two of them belongs to the second.
        is_gap = not content[at : found.start()].strip()
        yield Span(start=start + at, end=start + found.start(), kind=kind if is_gap else other)
        yield Span(start=start + found.start(), end=start + found.end(), kind=kind)
        at = found.end()
    yield Span(start=start + at, end=start + len(content), kind=other)
