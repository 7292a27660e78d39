"""JSON as RFC 8259 has it, and nothing that a canonical line could not hold."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

# Readers of JSON recurse, and each has a limit of its own; no record comes near this one.
MAX_DEPTH = 100
# Python's own limit, https://docs.python.org/3/library/stdtypes.html#int-max-str-digits
MAX_DIGITS = 4300


class RecordError(ValueError):
    """A record is not a Conversation.

    Args:
        path: Where in the record, as in `messages[2].role`.
        value: What stands there.
        reason: What is expected instead.
    """

    def __init__(self, path: str, value: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self.path = path
        self.value = value
        self.reason = reason


def path_of(location: tuple[int | str, ...]) -> str:
    """Return a place in a record as people write it, as in `messages[2].role`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def parse_json(text: str) -> Any:
    """Parse JSON and refuse what the canonical line could not hold.

    Raises:
        json.JSONDecodeError: The text is not JSON.
        RecordError: It holds a key twice, NaN, a number out of range, half a surrogate pair, or
            too many levels.
    """
    too_deep = RecordError("", "", f"the record is nested more than {MAX_DEPTH} levels deep")
    try:
        value = json.loads(
            text,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=_unique,
        )
    except RecursionError as error:
        raise too_deep from error
    # Only an escape, or half a pair in the text itself, makes half a pair; only brackets make levels.
    if "\\u" not in text and _is_unicode(text) and text.count("[") + text.count("{") <= MAX_DEPTH:
        return value
    for path, node in _walk(value):
        if isinstance(node, dict | list) and len(path) >= MAX_DEPTH:
            raise too_deep
        if isinstance(node, str) and not _is_unicode(node):
            reason = "an unpaired surrogate stands for no character"
            raise RecordError(path_of(path), node, reason)
    return value


def json_sentence(error: json.JSONDecodeError) -> str:
    """Return what is wrong with the text and where, as in `not JSON: extra data at column 7`."""
    message = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
    return f"not JSON: {message} at column {error.colno}"


def _refuse(constant: str) -> NoReturn:
    raise RecordError("", "", f"not JSON: {constant} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise RecordError("", digits, "the number is too large")
    return number


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise RecordError(
            "", "", f"a number has {len(digits)} digits; at most {MAX_DIGITS} are read"
        )
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RecordError(twice, "", "the key stands twice in one object")
    return values


def _walk(value: object) -> Iterator[tuple[tuple[int | str, ...], object]]:
    """Yield every value and every key with its path, in the order of the text."""
    stack: list[tuple[tuple[int | str, ...], object]] = [((), value)]
    while stack:
        path, node = stack.pop()
        yield path, node
        if isinstance(node, list):
            stack.extend(((*path, index), node[index]) for index in reversed(range(len(node))))
        elif isinstance(node, dict):
            for key in reversed(node):
                stack += [((*path, key), node[key]), ((*path, key), key)]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
