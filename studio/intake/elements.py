"""Cut a stream of JSON into its records without reading all of it: an array, or values in a row.

Only brackets, quotes and commas are looked at here, so that a record which is no JSON costs that
record alone; `parse_json` reads each one strictly. One record is in memory at a time.
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from studio.domain.validation import Issue

MAX_RECORD_BYTES = 16 * 2**20
CHUNK_BYTES = 2**20
_BLANKS = b" \t\r\n"
_BACKSLASH = ord("\\")
_INSIDE = re.compile(rb'["\[\]{}]')
_BETWEEN = re.compile(rb'[",\[\]{}]')


@dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """The bytes of one record.

    Attributes:
        line: Line of the file where it begins, from 1.
        column: Character of that line where it begins, from 1.
    """

    line: int
    column: int
    raw: bytes


def split_array(stream: BinaryIO) -> Iterator[Element | Issue]:
    """Yield the elements of a JSON array, and an Issue for each place where it is none.

    Args:
        stream: A content whose first byte, after a byte order mark and blanks, is `[`.
    """
    splitter = _Splitter(stream)
    splitter.skip_opening()
    num_elements = 0
    while True:
        element, mark = splitter.next(is_array=True)
        if element is not None:
            num_elements += 1
            yield element
        elif mark == b"," or (mark == b"]" and num_elements):
            reason = "not JSON: a comma without a record beside it"
            yield Issue(line=splitter.line, kind="json", reason=reason)
        if mark == b"]":
            yield from splitter.refuse_rest()
            return
        if not mark:
            if not isinstance(element, Issue):
                yield _cut_off(splitter.line, "the array is not closed by a ]")
            return


def split_values(stream: BinaryIO) -> Iterator[Element | Issue]:
    """Yield JSON values that stand one after the other, each over any number of lines."""
    splitter = _Splitter(stream)
    mark = b"}"
    while mark:
        element, mark = splitter.next(is_array=False)
        if element is not None:
            yield element


def _cut_off(line: int, what: str) -> Issue:
    reason = f"{what}; the file seems to be cut off: upload it again"
    return Issue(line=line, kind="truncated", reason=reason)


class _Splitter:
    """A window over the stream, which begins with the element that is being read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._window = b""
        self._start = 0
        self._at = 0
        self._long_line = 0
        self._is_in_text = False
        self._column = 1
        self.line = 1
        while len(self._window) < len(codecs.BOM_UTF8) and self._grow():
            continue
        if self._window.startswith(codecs.BOM_UTF8):
            self._start = self._at = len(codecs.BOM_UTF8)

    def skip_opening(self) -> None:
        """Go behind the bracket that opens an array."""
        while (at := self._window.find(b"[", self._start)) < 0 and self._grow():
            continue
        self._at = at + 1
        self._pass()

    def next(self, *, is_array: bool) -> tuple[Element | Issue | None, bytes]:
        """Return the next element, None for one of blanks only, and the mark that ends it.

        The mark is `,` or `]` in an array, a bracket otherwise, and empty at the end of the stream.
        """
        depth = 0
        while mark := self._next_mark(depth):
            self._at += 1
            if depth == 0 and is_array and mark in (b",", b"]"):
                return self._take(num_behind=1), mark
            if mark in (b"{", b"["):
                depth += 1
            elif mark in (b"}", b"]") and depth:
                depth -= 1
                if depth == 0 and not is_array:
                    return self._take(), mark
        element = self._take()
        if depth or self._is_in_text:
            line = element.line if element else self.line
            return _cut_off(line, "the record that begins here is not closed"), b""
        return element, b""

    def refuse_rest(self) -> Iterator[Issue]:
        """Yield an Issue when more than blanks is left."""
        is_more = True
        while is_more:
            self._at = len(self._window) - len(self._window[self._at :].lstrip(_BLANKS))
            self._pass()
            if self._at < len(self._window):
                reason = "not JSON: something follows the ] that closes the array"
                yield Issue(line=self.line, kind="json", reason=reason)
                return
            is_more = self._grow()

    def _next_mark(self, depth: int) -> bytes:
        """Go to the next bracket, or comma between elements, and return it."""
        search = (_INSIDE if depth else _BETWEEN).search
        while True:
            window = self._window
            found = search(window, self._at)
            if found is None:
                self._at = len(window)
                if not self._grow():
                    return b""
                continue
            at = found.start()
            if (mark := found[0]) != b'"':
                self._at = at
                return mark
            # Most texts hold no quotes and are in the window as a whole.
            end = window.find(b'"', at + 1)
            if end > 0 and window[end - 1] != _BACKSLASH and window.find(b"\n", at, end) < 0:
                self._at = end + 1
                continue
            self._at = at + 1
            if not self._finish_text():
                return b""

    def _finish_text(self) -> bool:
        """Go behind the end of a text; False if it has none."""
        self._is_in_text = True
        while True:
            window, at = self._window, self._at
            end = window.find(b'"', at)
            # JSON has no line feed inside a text, so one ends a text that somebody forgot to close.
            feed = window.find(b"\n", at, end if end >= 0 else len(window))
            if feed >= 0:
                break
            before = window[at:end] if end >= 0 else window[at:]
            is_escaped = (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
            if end >= 0 and not is_escaped:
                break
            if end >= 0:
                self._at = end + 1
                continue
            self._at = len(window) - is_escaped
            if not self._grow():
                return False
        self._at = (feed if feed >= 0 else end) + 1
        self._is_in_text = False
        return True

    def _grow(self) -> bool:
        """Read on; of an element that is too long, what was read is dropped."""
        if self._at - self._start > MAX_RECORD_BYTES:
            self._long_line = self._long_line or self._first_line()
            self._pass()
        chunk = self._stream.read(CHUNK_BYTES)
        self._window = self._window[self._start :] + chunk
        self._at -= self._start
        self._start = 0
        return bool(chunk)

    def _first_line(self) -> int:
        window, start = self._window, self._start
        num_blank = len(window) - start - len(window[start:].lstrip(_BLANKS))
        return self.line + window.count(b"\n", start, start + num_blank)

    def _take(self, num_behind: int = 0) -> Element | Issue | None:
        """Return what was passed over, and begin anew; `num_behind` bytes are not a part of it."""
        long_line, self._long_line = self._long_line, 0
        raw = self._window[self._start : self._at - num_behind]
        if long_line or len(raw) > MAX_RECORD_BYTES:
            line = long_line or self._first_line()
            self._pass()
            return Issue(line=line, kind="too_long", reason="the record is longer than 16 MiB")
        text = raw.lstrip(_BLANKS)
        end, self._at = self._at, self._at - num_behind - len(text)
        self._pass()
        line, column = self.line, self._column
        self._at = end
        self._pass()
        return Element(line=line, column=column, raw=text.rstrip(_BLANKS)) if text else None

    def _pass(self) -> None:
        """Begin an element at the present place, whose line and column are counted."""
        passed = self._window[self._start : self._at]
        num_feeds = passed.count(b"\n")
        tail = passed[passed.rfind(b"\n") + 1 :] if num_feeds else passed
        num_characters = len(tail.decode("utf-8", errors="replace"))
        self.line += num_feeds
        self._column = num_characters + (1 if num_feeds else self._column)
        self._start = self._at
