"""The canonical file of a Dataset: one record a line, and an index to reach any of them at once."""

import hashlib
import os
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from studio.domain.conversation import RECORD_TYPES, Conversation, Kind, Record
from studio.intake.duplicates import Duplicates, Finder, first_of_equals, line_hash
from studio.intake.texts import messages_of, visible_texts

# offset: where the record's line begins; group: number of the first record that is nearly equal.
INDEX = np.dtype([("offset", "<u8"), ("group", "<u4")])
# A search reads little where it finds much, and much where it finds little.
_FIRST_BLOCK_BYTES, _LAST_BLOCK_BYTES = 2**16, 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A canonical file and its index under temporary names."""

    path: Path
    index: Path
    sha256: str
    size_bytes: int
    num_records: int
    duplicates: Duplicates


class Writer:
    """Writes records to a canonical file; used as a context manager.

    Args:
        folder: Where the files are written; the caller renames them, or removes the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "canonical.jsonl"
        self._index = folder / "canonical.index.npy"
        self._file = self._path.open("w+b")
        self._digest = hashlib.sha256()
        self._offsets = array("Q")
        self._size = 0
        self._finder = Finder(folder)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._finder.__exit__()
        self._file.close()

    def add(self, record: Record) -> None:
        """Append a record."""
        line = record.to_line()
        self._offsets.append(self._size)
        self._size += len(line)
        self._digest.update(line)
        self._file.write(line)
        self._finder.add(record, line)

    def finish(self, record_type: type[Record] = Conversation) -> Written:
        """Make the file durable, find the duplicates and write the index.

        Args:
            record_type: Type of the records that were added.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        offsets = np.frombuffer(self._offsets, np.uint64)

        def fetch(number: int) -> Record:
            end = int(offsets[number + 1]) if number + 1 < len(offsets) else self._size
            start = int(offsets[number])
            line = os.pread(self._file.fileno(), end - start, start)
            return record_type.from_json(line)

        duplicates = self._finder.find(fetch)
        _save_index(self._index, offsets, duplicates)
        return Written(
            path=self._path,
            index=self._index,
            sha256=self._digest.hexdigest(),
            size_bytes=self._size,
            num_records=len(offsets),
            duplicates=duplicates,
        )


def _save_index(path: Path, offsets: NDArray[np.uint64], duplicates: Duplicates) -> None:
    index = np.empty(len(offsets), INDEX)
    index["offset"], index["group"] = offsets, duplicates.groups
    with path.open("wb") as file:
        np.save(file, index)
        file.flush()
        os.fsync(file.fileno())


class Canonical:
    """Records of a canonical file by their number, from 0; used as a context manager.

    The file is read in pieces and not mapped, as what is mapped counts as memory of the process.

    Args:
        path: The canonical file.
        index_path: Its index; written anew when it is missing or does not fit the file.
        kind: What the records are.

    Raises:
        OSError: The canonical file cannot be read.
    """

    def __init__(self, path: Path, index_path: Path, kind: Kind = Kind.CONVERSATIONS) -> None:
        self._type = RECORD_TYPES[kind]
        self._file = path.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        index = _load_index(index_path, self._file.fileno(), self._size)
        if index is None:
            _build_index(path, index_path, self._type)
            index = np.load(index_path, mmap_mode="r")
        self._offsets: NDArray[np.uint64] = index["offset"]
        self.groups: NDArray[np.uint32] = index["group"]

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._offsets)

    def __getitem__(self, number: int) -> Record:
        """Return a record."""
        return self._type.from_json(self.line(number))

    def __iter__(self) -> Iterator[Record]:
        """Yield all records."""
        return (self[number] for number in range(len(self)))

    def line(self, number: int) -> bytes:
        """Return the canonical line of a record, with its line feed."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = int(self._offsets[number])
        end = int(self._offsets[number + 1]) if number + 1 < len(self) else self._size
        return os.pread(self._file.fileno(), end - start, start)

    def slice(self, start: int, count: int) -> list[Record]:
        """Return `count` records from number `start`, fewer at the end."""
        return [self[n] for n in range(max(start, 0), min(start + count, len(self)))]

    def equals(self) -> NDArray[np.int64]:
        """Return, of each record, the number of the first one that it equals, tags aside."""
        hashes = (line_hash(self[n], self.line(n)) for n in range(len(self)))
        return first_of_equals(np.fromiter(hashes, np.uint64, len(self)))

    def find(self, text: str, start: int = 0, *, ignore_case: bool = False) -> int | None:
        """Return the number of the first record from `start` that holds a text; None without."""
        return next(self.hits(text, start, ignore_case=ignore_case), None)

    def hits(self, text: str, start: int = 0, *, ignore_case: bool = False) -> Iterator[int]:
        """Yield the numbers of all records from `start` that hold a text.

        Args:
            text: What is looked for in contents, thinking, tool calls and tools.
            start: Number of the first record that is looked at.
            ignore_case: Whether small and capital letters are the same.
        """
        matches = _matcher(text, ignore_case)
        for number in self._holding(_pattern(text, ignore_case), 6 * len(text), start):
            # The bytes may also be a field's name, or stand across two fields.
            if any(matches(found) for _, found in visible_texts(self[number])):
                yield number

    def first_with_images(self) -> int | None:
        """Return the number of the first record that shows an image; None without."""
        needle = b'"images":['  # inside of a text the quotes would be escaped
        for number in self._holding(re.compile(re.escape(needle)), len(needle), 0):
            if any(message.images for message in messages_of(self[number])):
                return number
        return None

    def _holding(self, pattern: re.Pattern[bytes], longest: int, start: int) -> Iterator[int]:
        """Yield the numbers of the records whose lines match; no match is longer than `longest`."""
        while start < len(self):
            at = self._search(pattern, longest, int(self._offsets[start]))
            if at is None:
                return
            number = int(np.searchsorted(self._offsets, np.uint64(at), side="right")) - 1
            yield number
            start = number + 1

    def _search(self, pattern: re.Pattern[bytes], longest: int, offset: int) -> int | None:
        block_bytes = _FIRST_BLOCK_BYTES
        while offset < self._size:
            block = os.pread(self._file.fileno(), block_bytes + longest, offset)
            found = pattern.search(block)
            if found is not None:
                return offset + found.start()
            offset += block_bytes
            block_bytes = min(2 * block_bytes, _LAST_BLOCK_BYTES)
        return None


def _matcher(text: str, ignore_case: bool) -> Callable[[str], bool]:
    if not ignore_case:
        return lambda found: text in found
    folded = text.lower()
    return lambda found: folded in found.lower()


def _pattern(text: str, ignore_case: bool) -> re.Pattern[bytes]:
    if not ignore_case:
        return re.compile(re.escape(_escaped(text)))
    return re.compile(b"".join(_either_case(letter) for letter in text))


def _either_case(letter: str) -> bytes:
    forms = sorted({letter, letter.lower(), letter.upper()})
    return b"(?:" + b"|".join(re.escape(_escaped(form)) for form in forms) + b")"


def _escaped(text: str) -> bytes:
    """Return a text as it stands between quotes in a canonical line."""
    return msgspec.json.encode(text)[1:-1]


def _load_index(path: Path, file: int, size: int) -> NDArray[np.void] | None:
    """Return the index if it fits the file."""
    try:
        index: NDArray[np.void] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # missing, foreign, or cut short
        return None
    if index.dtype != INDEX or not len(index):
        return None
    last = int(index["offset"][-1])
    return index if os.pread(file, size, last).find(b"\n") == size - last - 1 else None


def _build_index(path: Path, index_path: Path, record_type: type[Record]) -> None:
    offsets = array("Q", [0])
    with (
        tempfile.TemporaryDirectory(dir=index_path.parent, prefix=".index-") as name,
        path.open("rb") as file,
    ):
        with Finder(Path(name)) as finder:
            for line in file:
                finder.add(record_type.from_json(line), line)
                offsets.append(offsets[-1] + len(line))
            duplicates = finder.find(
                lambda n: record_type.from_json(
                    os.pread(file.fileno(), offsets[n + 1] - offsets[n], offsets[n])
                )
            )
        temporary = Path(name) / index_path.name
        _save_index(temporary, np.frombuffer(offsets, np.uint64)[:-1], duplicates)
        temporary.replace(index_path)
