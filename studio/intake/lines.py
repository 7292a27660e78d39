"""Cut a stream into lines in flat memory, whatever the length of a line."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

MAX_LINE_BYTES = 16 * 2**20
# What is kept of a line that is too long, to show it.
HEAD_BYTES = 64 * 2**10
# As much as stays in the processor's cache: a mebibyte at a time is a fifth slower.
_BLOCK_BYTES = 2**17
# It begins with a plain character, so that most of a text is passed over as fast as memory is read.
_PERHAPS_CONTROL = re.compile(rb"\\(?:u00[01]|[bf])")
# Tab, line feed and carriage return are u0009, u000a and u000d; pairs of backslashes are text.
_ESCAPED_CONTROL = re.compile(rb"(?<!\\)(?:\\\\)*\\(?:u00(?:0[0-8bBcCeEfF]|1)|[bf])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some lines in a row, without their line feeds.

    Attributes:
        first: Number of the first line, from 1.
        is_too_long: The block is the beginning of one line, the rest of which was skipped.
        is_cut: The last line has no line feed, as it ends the stream.
        has_mark: A byte order mark was taken from the first line.
        may_hold_controls: Somewhere in the block stands an escape sequence like that of a NUL.
    """

    first: int
    lines: list[bytes]
    is_too_long: bool = False
    is_cut: bool = False
    has_mark: bool = False
    may_hold_controls: bool = False


def read_blocks(stream: BinaryIO) -> Iterator[Block]:
    """Yield the lines of a stream in order, many at a time.

    A line ends with a line feed and nothing else: the other separators that Unicode knows may
    stand inside a JSON string.

    Args:
        stream: Bytes in UTF-8; what it raises passes through.
    """
    number, size = 1, 0
    pieces: list[bytes] = []
    chunk = stream.read(_BLOCK_BYTES)
    while chunk:
        end = chunk.rfind(b"\n")
        if end >= 0:
            for block in _blocks(number, b"".join((*pieces, chunk[:end]))):
                yield block
                number += len(block.lines)
            pieces, size = [chunk[end + 1 :]], len(chunk) - end - 1
        else:
            pieces.append(chunk)
            size += len(chunk)
        chunk = b""
        if size > MAX_LINE_BYTES:
            yield _too_long(number, b"".join(pieces))
            number, pieces, size = number + 1, [], 0
            chunk = _skip_line(stream)
        chunk = chunk or stream.read(_BLOCK_BYTES)
    if size:
        yield _block(number, b"".join(pieces).split(b"\n"), is_cut=True)


def _blocks(number: int, text: bytes) -> Iterator[Block]:
    """Yield whole lines; only the first began in an earlier chunk and can be too long."""
    if text.find(b"\n", 0, MAX_LINE_BYTES) < 0 and len(text) >= MAX_LINE_BYTES:
        long, feed, text = text.partition(b"\n")
        yield _too_long(number, long)
        if not feed:
            return
        number += 1
    yield _block(number, text.split(b"\n"), may_hold_controls=may_hold_controls(text))


def _block(
    number: int, lines: list[bytes], *, is_cut: bool = False, may_hold_controls: bool = True
) -> Block:
    has_mark = number == 1 and lines[0].startswith(codecs.BOM_UTF8)
    if has_mark:
        lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
    return Block(
        first=number,
        lines=lines,
        is_cut=is_cut,
        has_mark=has_mark,
        may_hold_controls=may_hold_controls,
    )


def may_hold_controls(text: bytes) -> bool:
    """Tell at a glance whether a control character is escaped in JSON; True is no verdict."""
    return _PERHAPS_CONTROL.search(text) is not None


def holds_controls(text: bytes) -> bool:
    """Tell whether a control character is escaped in JSON."""
    return may_hold_controls(text) and _ESCAPED_CONTROL.search(text) is not None


def _too_long(number: int, line: bytes) -> Block:
    return Block(first=number, lines=[line[:HEAD_BYTES]], is_too_long=True)


def _skip_line(stream: BinaryIO) -> bytes:
    """Read to the end of a line; return what was read of the next."""
    while chunk := stream.read(_BLOCK_BYTES):
        end = chunk.find(b"\n")
        if end >= 0:
            return chunk[end + 1 :]
    return b""
