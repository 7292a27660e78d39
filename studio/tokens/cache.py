"""The token cache: a Dataset as one model reads it, memory-mapped, untruncated.

A folder home.tokens/KEY holds part-00000.arrow and so on (Arrow IPC files, one for each process
that made them) and meta.json, which is written last. The key says all that decides the content:
Dataset, tokenizer, template, reading, version. A folder appears whole; a build that was killed
leaves a hidden folder that the next build removes.
"""

import bisect
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from studio.disk import Home
from studio.domain.reading import Reading
from studio.domain.section import Section
from studio.errors import NotFoundError, disk_errors
from studio.locks import take_lock
from studio.tokens.children import make_shards
from studio.tokens.counts import Counts, merge_counts
from studio.tokens.examples import Example
from studio.tokens.shard import RECORD_CPU_SECONDS, ShardOrder, kind_of, part_name
from studio.tokens.tokenizer import tokenizer_sha256
from studio.whole import locked, whole_folder

CACHE_VERSION = 2
MAX_BYTES = 20 * 2**30
# A process takes half a second to start, in which one reads about this much.
_BYTES_PER_PROCESS = 256 * 1024
_PACKAGES = ("delta-studio", "tokenizers", "tiktoken", "pyarrow", "jinja2")

Progress = Callable[[float], None]

log = logging.getLogger(__name__)


class Part(Section):
    """One file of a cache."""

    file: str
    num_conversations: int
    num_examples: int


class Meta(Section):
    """What meta.json says.

    Attributes:
        counts: Over the whole Dataset; its `refused` lists conversations that the template
            refuses, which no example stands for.
        is_fast: Whether the fast tokenizer agreed with the reference; else `why_slow`.
        peak_memory_bytes: Most resident memory of any process that made it.
    """

    version: int
    dataset_sha256: str
    tokenizer_sha256: str
    reading: Reading
    parts: tuple[Part, ...]
    counts: Counts
    is_fast: bool
    why_slow: str
    seconds: float
    peak_memory_bytes: int
    packages: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """Views of one record batch; arrays of n + 1 offsets stand before their values."""

    first: int
    lines: np.ndarray
    unwritten: np.ndarray
    token_offsets: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    turn_offsets: np.ndarray
    turns: np.ndarray


class TokenCache:
    """The examples of a Dataset, read from the disk as they are asked for.

    Args:
        folder: A folder that `build` made.

    Raises:
        OSError: It is not there.
        pa.ArrowInvalid: A file in it is damaged.
        KeyError: A file in it lacks a column.
        ValidationError: Its meta.json is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = (folder / "meta.json").read_text(encoding="utf-8")
        self.meta = Meta.model_validate_json(text)
        self._batches: list[_Batch] = []
        lengths, supervised, lines = [_EMPTY], [_EMPTY], [_EMPTY]
        line = first = 0
        for part in self.meta.parts:
            # A map outlives the name of its file: a cache that is removed can be read to its end.
            file = pa.ipc.open_file(pa.memory_map(str(folder / part.file)))
            for number in range(file.num_record_batches):
                batch = _views(file.get_batch(number), first, line)
                self._batches.append(batch)
                lengths.append(np.diff(batch.token_offsets).astype(np.uint32))
                supervised.append(file.get_batch(number).column("supervised").to_numpy())
                lines.append(batch.lines)
                first += len(batch.lines)
            line += part.num_conversations
        self._firsts = [batch.first for batch in self._batches]
        self.lengths: np.ndarray = np.concatenate(lengths)
        self.supervised: np.ndarray = np.concatenate(supervised)
        self.lines: np.ndarray = np.concatenate(lines)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[Example]:
        """Yield all examples."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """Return an example; its arrays are views of the file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = self._batches[bisect.bisect_right(self._firsts, index) - 1]
        row = index - batch.first
        tokens = slice(batch.token_offsets[row], batch.token_offsets[row + 1])
        return Example(
            line=int(batch.lines[row]),
            tokens=batch.tokens[tokens],
            mask=batch.mask[tokens],
            turns=batch.turns[batch.turn_offsets[row] : batch.turn_offsets[row + 1]],
            unwritten=int(batch.unwritten[row]),
        )


_EMPTY = np.zeros(0, dtype=np.uint32)


def _views(batch: pa.RecordBatch, first: int, first_line: int) -> _Batch:
    tokens, mask, turns = (batch.column(name) for name in ("tokens", "mask", "turns"))
    return _Batch(
        first=first,
        lines=batch.column("line").to_numpy() + np.uint32(first_line),
        unwritten=batch.column("unwritten").to_numpy(),
        token_offsets=tokens.offsets.to_numpy(),
        tokens=tokens.values.to_numpy(),
        mask=mask.values.to_numpy().view(np.bool_),
        turn_offsets=turns.offsets.to_numpy(),
        turns=turns.values.to_numpy(),
    )


def cache_key(dataset_sha256: str, tokenizer_sha: str, reading: Reading) -> str:
    """Return the name of the cache of a Dataset, as one tokenizer and template read it."""
    said = [CACHE_VERSION, dataset_sha256, tokenizer_sha, reading.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(said).encode("ascii")).hexdigest()


def no_progress(_: float) -> None:
    """Report to nobody."""


def build(
    home: Home,
    dataset_sha256: str,
    tokenizer: Path,
    reading: Reading,
    *,
    dataset: Path | None = None,
    processes: int = 0,
    progress: Progress = no_progress,
) -> TokenCache:
    """Return the token cache of a Dataset; make it where it is not there yet.

    Args:
        home: The home folder.
        dataset_sha256: Content hash of the canonical Dataset.
        tokenizer: Folder with tokenizer.json and the chat template.
        reading: What is learned of the thinking.
        dataset: The canonical JSONL, where it is not `home.dataset`.
        processes: How many work at once; 0 = one for each core.
        progress: Called with the share that is done, 0 to 1; what it raises ends the build.

    Returns:
        The cache. Who asks for the same one at the same time waits for the first.

    Raises:
        NotFoundError: The Dataset's file is gone.
        InputError: The tokenizer or its template is wrong.
        MachineError: The disk or the memory is full.
        EngineError: A process ended for no reason that is known.
    """
    sha = tokenizer_sha256(tokenizer)
    key = cache_key(dataset_sha256, sha, reading)
    folder = home.tokens / key
    with disk_errors("storing the token cache"), locked(_lock(home, key)):
        _sweep(home, key)
        cache = _opened(folder)
        if cache is not None:
            return cache
        source = dataset or home.dataset(dataset_sha256)
        if not source.exists():
            raise NotFoundError(
                "The file of the dataset is gone from the home folder.",
                "Add the dataset again; the same content takes its place.",
                "data.dataset",
            )
        with whole_folder(folder) as inner:
            order = _order(home, source, tokenizer, reading, processes)
            meta = _make(order, inner, (dataset_sha256, sha), progress)
            (inner / "meta.json").write_text(meta.model_dump_json(indent=2), encoding="utf-8")
        cache = TokenCache(folder)
    trim(home, MAX_BYTES, keep=folder)
    return cache


def _make(order: ShardOrder, folder: Path, hashes: tuple[str, str], progress: Progress) -> Meta:
    start = time.monotonic()
    reports = make_shards(order, folder, progress)
    return Meta(
        version=CACHE_VERSION,
        dataset_sha256=hashes[0],
        tokenizer_sha256=hashes[1],
        reading=order.reading,
        parts=tuple(
            Part(
                file=part_name(index),
                num_conversations=report.counts.num_conversations,
                num_examples=report.counts.num_examples,
            )
            for index, report in enumerate(reports)
        ),
        counts=merge_counts([report.counts for report in reports]),
        is_fast=all(report.is_fast for report in reports),
        why_slow=next((report.why_slow for report in reports if report.why_slow), ""),
        seconds=time.monotonic() - start,
        peak_memory_bytes=max(report.peak_memory_bytes for report in reports),
        packages={name: version(name) for name in _PACKAGES},
    )


def _lock(home: Home, key: str) -> Path:
    return home.tokens / f".{key}.lock"


def _sweep(home: Home, mine: str) -> None:
    """Remove what builds have left that nobody works on any more."""
    for left in home.tokens.glob(".*.*"):
        key = left.name.split(".")[1]
        if not left.is_dir():
            continue
        if key == mine:
            shutil.rmtree(left)
            continue
        lock = take_lock(_lock(home, key))
        if lock is not None:
            with lock:
                shutil.rmtree(left)


def _opened(folder: Path) -> TokenCache | None:
    """Return the cache that is there, unless it is missing or damaged."""
    if not folder.exists():
        return None
    try:
        cache = TokenCache(folder)
    except (OSError, KeyError, pa.ArrowInvalid, ValidationError) as error:
        log.warning("the token cache %s is damaged and is made anew: %s", folder.name, error)
        return None
    os.utime(folder / "meta.json")
    return cache


def _order(
    home: Home, source: Path, tokenizer: Path, reading: Reading, processes: int
) -> ShardOrder:
    home.verdicts.mkdir(parents=True, exist_ok=True)
    size, processes = source.stat().st_size, processes or len(os.sched_getaffinity(0))
    with source.open("rb") as file:
        kind = kind_of(file.readline())
        num_parts = max(1, min(processes, size // _BYTES_PER_PROCESS))
        cuts = [0]
        for part in range(1, num_parts):
            file.seek(max(cuts[-1], size * part // num_parts - 1))
            file.readline()
            cuts.append(file.tell())
    cuts.append(size)
    return ShardOrder(
        dataset=source.resolve(),
        kind=kind,
        tokenizer=tokenizer.resolve(),
        verdicts=home.verdicts,
        reading=reading,
        ranges=tuple(pairwise(cuts)),
        cpu_seconds=RECORD_CPU_SECONDS,
    )


def trim(home: Home, max_bytes: int, *, keep: Path) -> None:
    """Remove the caches that were not used for the longest time, until the rest fits.

    Args:
        home: The home folder.
        max_bytes: What all caches may take together.
        keep: The one that is needed now.
    """
    sizes = {}
    for meta in home.tokens.glob("*/meta.json"):
        sizes[meta] = sum(file.stat().st_size for file in meta.parent.iterdir())
    total = sum(sizes.values())
    for meta in sorted(sizes, key=lambda path: path.stat().st_mtime):
        if total <= max_bytes:
            return
        if meta.parent != keep:
            # Without its meta.json it is none, however far the removal comes.
            meta.unlink(missing_ok=True)
            shutil.rmtree(meta.parent, ignore_errors=True)
            total -= sizes[meta]
