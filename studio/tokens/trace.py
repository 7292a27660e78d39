"""A straight program over the values of a record, and texts as literals and numbers of values.

A Trace holds real values (contents, tool calls) and what was done with them: steps that make new
values, and guards, questions about values with the answer that was found. Run again on other values,
the program makes the same of them, as long as every guard gives its answer.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

Piece = str | int
Action = Callable[[Any], Any]


class NotSeparable(Exception):  # noqa: N818
    """Something was done with a value that cannot be followed."""


class Trace:
    """Real values, and what was done with them.

    Args:
        inputs: The values that a record brings.

    Attributes:
        values: Inputs and what the steps made, by number.
        steps: What is done, in order: (action, number of its value or -1 for all, whether it is a
            guard, the answer expected of a guard).
        fault: What could not be followed, empty where all could.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.values = list(inputs)
        self.steps: list[tuple[Action, int, bool, Any]] = []
        self.fault = ""
        self._known: dict[tuple[Any, ...], Any] = {}

    def make(self, source: int, name: str, action: Action, *about: Any) -> int:
        """Do something with a value; return the number of what it makes."""
        key = (source, name, *about)
        if key not in self._known:
            self._known[key] = len(self.values)
            self.values.append(action(self._get(source)))
            self.steps.append((action, source, False, None))
        number: int = self._known[key]
        return number

    def ask(self, source: int, name: str, action: Action, *about: Any) -> Any:
        """Ask something of a value; the answer becomes a condition."""
        key = (source, name, *about)
        if key not in self._known:
            self._known[key] = action(self._get(source))
            self.steps.append((action, source, True, self._known[key]))
        return self._known[key]

    def refuse(self, what: str) -> NoReturn:
        """Remember that something cannot be followed, even if a template hides the error."""
        self.fault = what
        raise NotSeparable(what)

    def _get(self, source: int) -> Any:
        return self.values if source < 0 else self.values[source]


def written(pieces: Iterable[Piece], values: Sequence[Any]) -> str:
    """Return the text that pieces are with these values."""
    return "".join([piece if isinstance(piece, str) else values[piece] for piece in pieces])


def starts(text: Iterable[Piece], prefix: Iterable[Piece], values: Sequence[Any]) -> bool:
    """Tell whether one text starts with another with these values."""
    wanted = written(prefix, values)
    found = ""
    for piece in text:
        found += piece if isinstance(piece, str) else values[piece]
        if len(found) >= len(wanted):
            break
    return found.startswith(wanted)


def equal(one: Iterable[Piece], other: Iterable[Piece], values: Sequence[Any]) -> bool:
    """Tell whether two texts are the same with these values."""
    return written(one, values) == written(other, values)


def without_same_start(
    ours: tuple[Piece, ...], theirs: tuple[Piece, ...]
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Return both without what they begin with in common, literal or value."""
    at = 0
    while at < min(len(ours), len(theirs)) and ours[at] == theirs[at]:
        at += 1
    ours, theirs = ours[at:], theirs[at:]
    if ours and theirs and isinstance(ours[0], str) and isinstance(theirs[0], str):
        size = min(len(ours[0]), len(theirs[0]))
        if ours[0][:size] == theirs[0][:size]:
            rests = (ours[0][size:], theirs[0][size:])
            cut = [
                (*((rest,) if rest else ()), *pieces[1:])
                for rest, pieces in zip(rests, (ours, theirs), strict=True)
            ]
            return without_same_start(cut[0], cut[1])
    return ours, theirs


def differ(ours: tuple[Piece, ...], theirs: tuple[Piece, ...]) -> bool:
    """Tell whether two texts differ at their start, whatever the values."""
    return bool(ours and theirs) and isinstance(ours[0], str) and isinstance(theirs[0], str)
