"""Turn tokens into the text of a reply, piece by piece, never half of anything.

A piece holds no half UTF-8 character, no special token, no beginning of what may become a stop
sequence or the end of the thinking. All pieces together are the reply; a reply that is not
streamed is made of the same pieces.
Not covered: `<tool_call>` blocks stay text in the content, as the model wrote them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

THINK_START, THINK_END = "<think>", "</think>"
# A byte-level token can end within a character; tokenizers then decodes it to this sign.
_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one step added to a reply.

    Attributes:
        num_tokens: Tokens of the reply so far.
        finish_reason: Set on the last piece: `stop` where the model or a stop sequence ended the
            reply, `length` where it ran into its limit.
    """

    reasoning: str = ""
    content: str = ""
    num_tokens: int = 0
    finish_reason: Literal["stop", "length"] | None = None


def pieces(
    tokens: Iterable[int | None],
    decode_text: Callable[[list[int]], str],
    *,
    stop_ids: frozenset[int],
    stop: Sequence[str],
    is_thinking: bool,
) -> Iterator[Piece]:
    """Yield one Piece per step of the model.

    Args:
        tokens: Tokens of the reply; None is a step without a token.
        decode_text: Decodes tokens, leaving special ones out.
        stop_ids: Tokens that end the reply.
        stop: Texts that end the reply and are not part of it.
        is_thinking: Whether the prompt ends within the thinking.
    """
    writer, cutter, splitter = Detokenizer(decode_text), StopCutter(stop), Splitter(is_thinking)
    num_tokens = 0
    finish_reason: Literal["stop", "length"] = "length"
    for token in tokens:
        if token is None:
            yield Piece(num_tokens=num_tokens)
            continue
        num_tokens += 1
        if token in stop_ids:
            finish_reason = "stop"
            break
        text = cutter.push(writer.push(token))
        if cutter.is_cut:
            finish_reason = "stop"
            yield _piece(splitter.push(text), num_tokens)
            break
        yield _piece(splitter.push(text), num_tokens)
    rest = "" if cutter.is_cut else cutter.push(writer.flush())
    rest += "" if cutter.is_cut else cutter.flush()
    parts = [splitter.push(rest), splitter.flush()]
    yield Piece(
        reasoning="".join(part[0] for part in parts),
        content="".join(part[1] for part in parts),
        num_tokens=num_tokens,
        finish_reason="stop" if cutter.is_cut else finish_reason,
    )


def _piece(parts: tuple[str, str], num_tokens: int) -> Piece:
    return Piece(reasoning=parts[0], content=parts[1], num_tokens=num_tokens)


class Detokenizer:
    """Decodes a growing list of tokens in whole characters.

    Args:
        decode_text: Decodes tokens, leaving special ones out.
    """

    def __init__(self, decode_text: Callable[[list[int]], str]) -> None:
        self._decode = decode_text
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Return the characters that this token completes."""
        self._pending.append(token)
        text = self._decode(self._pending)
        if text.endswith(_HALF_CHARACTER):
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """Return what is left, half characters as replacement signs."""
        text = self._decode(self._pending) if self._pending else ""
        self._pending.clear()
        return text


class StopCutter:
    """Ends a text before the first stop sequence.

    Args:
        stop: The stop sequences, none of them empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.is_cut = False

    def push(self, text: str) -> str:
        """Return what surely comes before any stop sequence."""
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.is_cut, self._held = True, ""
            return text[: min(found)]
        self._held = _beginning_of(self._stop, text)
        return text.removesuffix(self._held)

    def flush(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


class Splitter:
    """Tells thinking from content.

    Args:
        is_thinking: Whether the text begins within the thinking.
    """

    def __init__(self, is_thinking: bool) -> None:
        self._is_thinking = is_thinking
        self._is_content_due = False
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Return reasoning and content that are sure by now."""
        if not self._is_thinking:
            return "", self._content(text)
        text = self._held + text
        thought, end, rest = text.partition(THINK_END)
        if end:
            self._is_thinking, self._is_content_due, self._held = False, True, ""
            return thought.rstrip("\n"), self._content(rest)
        # Templates put line breaks around the mark; they belong to it, not to the thought.
        sure = text.removesuffix(_beginning_of((THINK_END,), text)).rstrip("\n")
        self._held = text.removeprefix(sure)
        return sure, ""

    def flush(self) -> tuple[str, str]:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held, ""

    def _content(self, text: str) -> str:
        if self._is_content_due:
            text = text.lstrip("\n")
            self._is_content_due = not text
        return text


def _beginning_of(marks: Sequence[str], text: str) -> str:
    """Return the longest end of `text` that begins a mark."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return text[-size:]
    return ""
