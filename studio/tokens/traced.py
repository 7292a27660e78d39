"""Texts that remember where they come from: what the course of a chat template is followed with.

A Traced text looks like a text to a template and consists of literals and values of a Trace; cutting
its ends is a step, asking what it holds is a guard, and all that cannot be followed raises
NotSeparable.
"""

from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter, methodcaller
from typing import Any, NoReturn

from studio.tokens.trace import (
    Action,
    NotSeparable,
    Piece,
    Trace,
    differ,
    equal,
    starts,
    without_same_start,
    written,
)

# Stands for a value wherever C code copies the characters of a Traced text without asking it: what
# is written is searched for it. A character for private use, which no template writes.
MARK = "\U000f5eed"


class Traced(str):
    """A text of literals and values.

    Attributes:
        trace: Where its values are.
        pieces: Literals, and numbers of values; never two literals side by side.
    """

    trace: Trace
    pieces: tuple[Piece, ...]

    def __new__(cls, trace: Trace, pieces: Iterable[Piece]) -> "Traced":
        """Join neighbouring literals and leave empty ones out."""
        self = super().__new__(cls, MARK)
        joined: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                joined[-1] += piece
            elif piece != "":
                joined.append(piece)
        self.trace = trace
        self.pieces = tuple(joined)
        return self

    def __str__(self) -> "Traced":
        """Return itself: `str` must not lose where it comes from."""
        return self

    def __add__(self, other: str) -> "Traced":
        """Return it before another text."""
        return Traced(self.trace, (*self.pieces, *pieces_of(other)))

    def __radd__(self, other: str) -> "Traced":
        """Return it after another text."""
        return Traced(self.trace, (*pieces_of(other), *self.pieces))

    def __bool__(self) -> bool:
        """Tell whether it is not empty, as a condition where it has no literal."""
        if any(isinstance(piece, str) for piece in self.pieces):
            return True
        return bool(self.pieces) and bool(self.trace.ask(self._number(), "bool", bool))

    def __eq__(self, other: object) -> bool:
        """Tell whether it is the same text; a condition where that depends on values."""
        if not isinstance(other, str):
            return False
        ours, theirs = without_same_start(self.pieces, pieces_of(other))
        if not ours and not theirs:
            return True
        if differ(ours, theirs):
            return False
        return bool(self.trace.ask(-1, "eq", partial(equal, ours, theirs), ours, theirs))

    def __ne__(self, other: object) -> bool:
        """Tell whether it is another text."""
        return not self == other

    def __hash__(self) -> int:
        """Refuse: what is looked up decides unseen."""
        return self.trace.refuse("a text is looked up")

    def __contains__(self, part: object) -> bool:
        """Tell whether a literal stands in it, as a condition."""
        if type(part) is not str:
            self.trace.refuse("a text of the conversation is looked for in another")
        return bool(self.trace.ask(self._number(), "in", methodcaller("__contains__", part), part))

    def startswith(self, prefix: Any, *rest: Any) -> bool:
        """Tell whether it starts with another text, Traced or not."""
        if rest or not isinstance(prefix, str):
            self.trace.refuse("startswith with several texts or places")
        ours, theirs = without_same_start(self.pieces, pieces_of(prefix))
        if not theirs:
            return True
        if differ(ours, theirs):
            return False
        return bool(self.trace.ask(-1, "startswith", partial(starts, ours, theirs), ours, theirs))

    def endswith(self, suffix: Any, *rest: Any) -> bool:
        """Tell whether it ends with a literal."""
        if rest or type(suffix) is not str:
            self.trace.refuse("endswith with several texts or places")
        action = methodcaller("endswith", suffix)
        return bool(self.trace.ask(self._number(), "endswith", action, suffix))

    def lstrip(self, chars: str | None = None) -> "Traced":
        """Return it without such characters at its start."""
        first = self.pieces[0] if self.pieces else 0
        if isinstance(first, str) and (rest := first.lstrip(chars)):
            return Traced(self.trace, (rest, *self.pieces[1:]))
        return self._made("lstrip", chars)

    def rstrip(self, chars: str | None = None) -> "Traced":
        """Return it without such characters at its end."""
        last = self.pieces[-1] if self.pieces else 0
        if isinstance(last, str) and (rest := last.rstrip(chars)):
            return Traced(self.trace, (*self.pieces[:-1], rest))
        return self._made("rstrip", chars)

    def strip(self, chars: str | None = None) -> "Traced":
        """Return it without such characters at both ends."""
        return self._made("strip", chars)

    def split(self, *how: Any, **named: Any) -> list[str]:
        """Return its parts, of which the number is a condition."""
        if named:
            self.trace.refuse("split with names")
        parts = self.trace.make(self._number(), "split", methodcaller("split", *how), *how)
        count = self.trace.ask(parts, "len", len)
        made = (self.trace.make(parts, "item", itemgetter(n), n) for n in range(count))
        return [Traced(self.trace, (number,)) for number in made]

    def _made(self, name: str, *arguments: Any) -> "Traced":
        if not self.pieces:
            return self
        action = methodcaller(name, *arguments)
        return Traced(self.trace, (self.trace.make(self._number(), name, action, *arguments),))

    def _number(self) -> int:
        """Return the number of the value that the whole text is."""
        if len(self.pieces) == 1 and isinstance(self.pieces[0], int):
            return self.pieces[0]
        return self.trace.make(-1, "join", partial(written, self.pieces), self.pieces)


class Safe(Traced):
    """A text that is marked safe: it may be written, and nothing else."""

    def __add__(self, other: str) -> "Traced":
        """Refuse: a safe text escapes the one that it is joined with."""
        return self.trace.refuse(f"a safe text is joined with {type(other).__name__}")

    __radd__ = __add__


class Opaque:
    """A value of JSON that a template does not look into without being seen.

    Args:
        trace: Where the value is.
        number: Its number there.
    """

    def __init__(self, trace: Trace, number: int) -> None:
        self.__dict__.update(trace=trace, number=number)

    def __str__(self) -> Traced:
        """Return what `str` makes of the value."""
        trace: Trace = self.__dict__["trace"]
        return Traced(trace, (trace.make(self.__dict__["number"], "str", str),))

    def __bool__(self) -> bool:
        """Tell whether Python takes the value for true, as a condition."""
        return bool(self.ask("bool", bool))

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse: a template that looks into the value is not followed."""
        self._refuse(name)

    def __hash__(self) -> int:
        """Refuse: what is looked up decides unseen."""
        return self._refuse()

    def _refuse(self, *_others: object) -> NoReturn:
        trace: Trace = self.__dict__["trace"]
        trace.refuse("a look into a value")

    __eq__ = __ne__ = __iter__ = __len__ = __getitem__ = __contains__ = __call__ = _refuse
    __add__ = __radd__ = __lt__ = __gt__ = __le__ = __ge__ = __int__ = __float__ = _refuse
    __repr__ = __format__ = __index__ = _refuse

    def ask(self, name: str, action: Action) -> Any:
        """Ask something of the value."""
        trace: Trace = self.__dict__["trace"]
        return trace.ask(self.__dict__["number"], name, action)

    def make(self, name: str, action: Action, *about: Any) -> str:
        """Return the text that an action makes of the value."""
        trace: Trace = self.__dict__["trace"]
        return Traced(trace, (trace.make(self.__dict__["number"], name, action, *about),))

    def items(self) -> list[tuple[str, Any]]:
        """Return keys, which become a condition, and values of a mapping."""
        trace: Trace = self.__dict__["trace"]
        if self.ask("type", type) is not dict:
            trace.refuse("items of what is no mapping")
        number: int = self.__dict__["number"]
        found = []
        for key in trace.ask(number, "keys", tuple):
            if "<|im_" in key:
                trace.refuse("a control token in a key")
            value = trace.make(number, "value", itemgetter(key), key)
            is_text = trace.ask(value, "type", type) is str
            found.append((key, Traced(trace, (value,)) if is_text else Opaque(trace, value)))
        return found


def pieces_of(text: str) -> tuple[Piece, ...]:
    """Return literals and values of a text, Traced or not."""
    if isinstance(text, Traced):
        return text.pieces
    if not isinstance(text, str):
        raise NotSeparable(f"a text and {type(text).__name__} are joined")
    return (text,) if text else ()


def concat(texts: Iterable[str]) -> str:
    """Return texts as one, Traced if one of them is."""
    parts = list(texts)
    for part in parts:
        if isinstance(part, Traced):
            return Traced(part.trace, [piece for text in parts for piece in pieces_of(text)])
    return "".join(parts)


def _block(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Traced, *_: Any, **__: Any) -> NoReturn:
        self.trace.refuse(f"str.{name}")

    return refuse


# What a text does without showing its characters; all else of it is refused.
_KEPT = {
    "__class__",
    "__delattr__",
    "__dir__",
    "__doc__",
    "__getattribute__",
    "__getstate__",
    "__init__",
    "__init_subclass__",
    "__setattr__",
    "__subclasshook__",
}
for _name in {*dir(str)} - _KEPT - {*Traced.__dict__}:
    setattr(Traced, _name, _block(_name))
