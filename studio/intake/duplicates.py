"""Equal and nearly equal records.

Equal: the same canonical line without its tags, by a 64-bit hash. Nearly equal: at least 0.85 of
the word triples are in both, counted over the whole text and over the answers alone, so that one
question with two answers, or one document with two questions, stays two records. Pairs are found
by MinHash and bands (locality-sensitive hashing) and then counted exactly, from the records.

Memory does not grow with the length of records: 8 bytes for each stay, what the bands need waits
in a temporary file, and at the end about 60 bytes for each are taken for a moment.
"""

import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from studio.domain.conversation import Record
from studio.intake.shingles import (
    BANDS,
    BATCH_BYTES,
    MAX_TEXT_BYTES,
    SIGNATURE,
    band_hashes,
    jaccard,
    shingle_set,
    signatures,
)
from studio.intake.texts import messages_of, texts_of

SIMILARITY = 0.85
# Below this estimate from SIGNATURE entries a pair is not counted: 3.5 standard deviations.
MIN_ESTIMATE = 0.65
# A pair that is counted costs 0.1 ms; a file of one template filled in a million times has to end.
MAX_COUNTED = 500_000
# Of records that share a band, each is compared with the first, then with the first of the rest.
ROUNDS = 4
_SPOOLED = np.dtype([("bands", "<u4", BANDS), ("sketch", "u1", SIGNATURE)])
_64_BITS = 2**64 - 1
_BLOCK = 65_536  # records or pairs of one numpy operation

Numbers = NDArray[np.int64]
Fetch = Callable[[int], Record]


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicates:
    """What is equal and nearly equal among records, by their numbers from 0.

    Attributes:
        groups: Of each record, the first record of its group: itself when it has none.
        exact: (n, 2): a record and the first one that it equals.
        near: (n, 2): a record and the first one of its group, which it does not equal.
        is_complete: False when too many pairs were alike to count them all.
    """

    groups: NDArray[np.uint32]
    exact: Numbers
    near: Numbers
    is_complete: bool


def line_hash(record: Record, line: bytes) -> int:
    """Return 64 bits of a record's content, the same in one process; `line` is its canonical line."""
    if record.tags:
        line = msgspec.structs.replace(record, tags=()).to_line()
    return hash(line) & _64_BITS  # SipHash with a key of this process: nobody can aim at it


class Finder:
    """Takes records one by one and tells at the end which are alike.

    Args:
        folder: Where its temporary file lies; the system's folder for these when None.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._hashes = array("Q")
        self._has_words = bytearray()
        self._spool = tempfile.TemporaryFile(dir=folder)
        self._batch: list[bytes] = []
        self._batch_bytes = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the temporary file."""
        self._spool.close()

    def add(self, record: Record, line: bytes) -> None:
        """Take the next record and its canonical line."""
        self._hashes.append(line_hash(record, line))
        text = " ".join(texts_of(record)).lower().encode("utf-8")
        if len(text) > MAX_TEXT_BYTES:
            text = b""
        self._batch.append(text)
        self._batch_bytes += len(text) + 1
        if self._batch_bytes >= BATCH_BYTES:
            self._flush()

    def hashes(self) -> NDArray[np.uint64]:
        """Return the hash of each record that was taken."""
        return np.frombuffer(self._hashes, np.uint64)

    def find(self, fetch: Fetch) -> Duplicates:
        """Compare all records that were taken.

        Args:
            fetch: Returns a record by its number.
        """
        self._flush()
        self._spool.flush()
        first = first_of_equals(self.hashes())
        numbers = np.arange(len(first))
        is_copy = first != numbers
        members = np.flatnonzero(~is_copy & np.frombuffer(self._has_words, np.bool_))
        search = _Search(first, fetch)
        if len(members) > 1:
            sketches = np.memmap(self._spool, _SPOOLED, "r")["sketch"]
            for band in range(BANDS):
                search.compare(members, self._band(band)[members], sketches)
        groups = search.roots()
        is_near = (groups != numbers) & ~is_copy
        return Duplicates(
            groups=groups.astype(np.uint32),
            exact=np.column_stack([numbers, first])[is_copy],
            near=np.column_stack([numbers, groups])[is_near],
            is_complete=search.num_counted < MAX_COUNTED,
        )

    def _flush(self) -> None:
        if not self._batch:
            return
        rows, has_words = signatures(self._batch)
        spooled = np.empty(len(rows), _SPOOLED)
        spooled["bands"] = band_hashes(rows)
        spooled["sketch"] = rows  # the low byte: enough to compare, https://arxiv.org/abs/0910.3349
        self._spool.write(spooled.tobytes())
        self._has_words += has_words.tobytes()
        self._batch.clear()
        self._batch_bytes = 0

    def _band(self, band: int) -> NDArray[np.uint32]:
        self._spool.seek(0)
        blocks = [np.zeros(0, np.uint32)]
        # Read, not mapped: what is mapped counts as memory of this process.
        while len(block := np.fromfile(self._spool, _SPOOLED, _BLOCK)):
            blocks.append(block["bands"][:, band].copy())
        return np.concatenate(blocks)


class _Search:
    """Groups that grow by comparing the members of each band.

    Args:
        first: Of each record, the first one that it equals.
        fetch: Returns a record by its number.
    """

    def __init__(self, first: Numbers, fetch: Fetch) -> None:
        self.num_counted = 0
        self._parents = first.copy()
        self._refused: set[tuple[int, int]] = set()
        self._fetch = fetch
        # A leader stays while its followers pass; one text may be a quarter of a megabyte.
        self._parts = lru_cache(maxsize=8)(self._read_parts)

    def compare(
        self, members: Numbers, bands: NDArray[np.uint32], sketches: NDArray[np.uint8]
    ) -> None:
        """Join what is alike among members with the same band."""
        order = np.argsort(bands, kind="stable")
        members, bands = members[order], bands[order]
        for _ in range(ROUNDS):
            is_first = np.append(True, bands[1:] != bands[:-1])
            leaders = members[np.maximum.accumulate(np.where(is_first, np.arange(len(bands)), 0))]
            leaders, members, bands = leaders[~is_first], members[~is_first], bands[~is_first]
            for one, other in self._candidates(leaders, members, sketches):
                self._count(one, other)
            roots = self.roots()
            is_left = roots[leaders] != roots[members]
            members, bands = members[is_left], bands[is_left]
            if not len(members):
                return

    def roots(self) -> Numbers:
        """Return the first record of each record's group."""
        roots = self._parents
        while not np.array_equal(higher := roots[roots], roots):
            roots = higher
        self._parents = roots.copy()
        return roots

    def _candidates(
        self, ones: Numbers, others: Numbers, sketches: NDArray[np.uint8]
    ) -> Iterator[tuple[int, int]]:
        roots = self.roots()
        is_open = roots[ones] != roots[others]
        ones, others = ones[is_open], others[is_open]
        for start in range(0, len(ones), _BLOCK):
            one, other = ones[start : start + _BLOCK], others[start : start + _BLOCK]
            estimate = (sketches[one] == sketches[other]).mean(axis=1)
            close = estimate >= MIN_ESTIMATE
            yield from zip(one[close].tolist(), other[close].tolist(), strict=True)

    def _count(self, one: int, other: int) -> None:
        """Join two records if they are alike, counted exactly."""
        roots = self._root(one), self._root(other)
        if roots[0] == roots[1] or (one, other) in self._refused:
            return
        if self.num_counted >= MAX_COUNTED:
            return
        self.num_counted += 1
        if _is_alike(self._parts(one), self._parts(other)):
            self._parents[max(roots)] = min(roots)
        else:
            self._refused.add((one, other))

    def _root(self, number: int) -> int:
        while (parent := int(self._parents[number])) != number:
            number = parent
        return number

    def _read_parts(self, number: int) -> "_Parts":
        return _parts(self._fetch(number))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    whole: set[tuple[str, ...]]
    answers: set[tuple[str, ...]]
    pictures: tuple[str, ...]


def _parts(record: Record) -> _Parts:
    asked, answered = texts_of(record)
    return _Parts(
        whole=shingle_set(f"{asked} {answered}"),
        answers=shingle_set(answered),
        pictures=tuple(image.ref for shown in messages_of(record) for image in shown.images),
    )


def _is_alike(one: _Parts, other: _Parts) -> bool:
    return (
        one.pictures == other.pictures
        and jaccard(one.whole, other.whole) >= SIMILARITY
        and jaccard(one.answers, other.answers) >= SIMILARITY
    )


def first_of_equals(hashes: NDArray[np.uint64]) -> Numbers:
    """Return, of each hash, the place of the first one that is equal."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    is_first = np.append(True, ordered[1:] != ordered[:-1])[: len(order)]
    first = np.empty(len(order), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    return first
