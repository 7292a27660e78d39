"""One shard of the token cache: a range of a Dataset's lines, read in a process of its own.

`python -m studio.tokens shard ORDER.json INDEX` writes part-INDEX.arrow beside the order and says
one JSON object a line: {"bytes": n} now and then, {"done": ShardReport} at the end.
"""

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from studio.domain.conversation import RECORD_TYPES, Kind, Record
from studio.domain.reading import Reading
from studio.domain.section import Section
from studio.errors import InputError, disk_errors
from studio.tokens.counts import Counts, Tally, num_supervised
from studio.tokens.examples import Example, ExampleMaker
from studio.tokens.limits import LOAD_CPU_SECONDS, MEMORY_BYTES, grant_cpu, peak_memory_bytes
from studio.tokens.tokenizer import load

# Processor time of one conversation: a line of 16 MB takes about 10 s where no fast path is.
RECORD_CPU_SECONDS = 60
# Tokens of a record batch: 5 bytes each, so that memory stays flat.
_BATCH_TOKENS = 1 << 20
_BATCH_EXAMPLES = 1 << 16
_SAY_SECONDS = 0.2

SCHEMA = pa.schema(
    [
        ("line", pa.uint32()),
        ("supervised", pa.uint32()),
        ("unwritten", pa.uint32()),
        ("tokens", pa.list_(pa.uint32())),
        ("mask", pa.list_(pa.uint8())),
        ("turns", pa.list_(pa.uint32())),
    ]
)


class ShardOrder(Section):
    """What all shards of one cache are made from.

    Attributes:
        verdicts: Where it is kept whether a tokenizer has a fast path.
        ranges: First byte and end of each shard, at line ends.
        memory_bytes: Address space of each process.
        cpu_seconds: Processor time of one conversation.
    """

    dataset: Path
    kind: Kind
    tokenizer: Path
    verdicts: Path
    reading: Reading
    ranges: tuple[tuple[int, int], ...]
    memory_bytes: int = MEMORY_BYTES
    cpu_seconds: int = RECORD_CPU_SECONDS


class ShardReport(Section):
    """How a shard went."""

    counts: Counts
    is_fast: bool
    why_slow: str
    peak_memory_bytes: int


def part_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"part-{index:05d}.arrow"


def position_name(index: int) -> str:
    """Return the name of the file that says which conversation of the shard is being read."""
    return f"part-{index:05d}.at"


def kind_of(line: bytes) -> Kind:
    """Tell what the records of a canonical Dataset are from its first line.

    Raises:
        InputError: It is no record.
    """
    if not line.strip():
        return Kind.CONVERSATIONS
    try:
        keys = msgspec.json.decode(line, type=dict[str, msgspec.Raw]).keys()
    except msgspec.MsgspecError as error:
        raise no_record(1, error) from error
    if "text" in keys:
        return Kind.TEXTS
    return Kind.PREFERENCES if "chosen" in keys else Kind.CONVERSATIONS


def no_record(line: int, error: msgspec.MsgspecError) -> InputError:
    """Return that a line, from 1, is not as the studio writes it."""
    return InputError(
        f"Line {line} of the dataset's file is no record of the studio: {error}.",
        "Add the file that you mean as a new dataset.",
        "data.dataset",
    )


def make_shard(
    order: ShardOrder, folder: Path, index: int, say: Callable[[dict[str, Any]], None]
) -> ShardReport:
    """Read a range of lines and write its examples.

    Args:
        order: What to read.
        folder: Where the shard is written.
        index: Which range.
        say: Receives {"bytes": n} as the work goes on.

    Raises:
        InputError: The tokenizer or its template cannot be read.
        MachineError: The disk is full or read-only.
    """
    grant_cpu(LOAD_CPU_SECONDS)
    tokenizer = load(order.tokenizer, order.verdicts)
    tally = Tally(ExampleMaker(tokenizer, order.reading), order.memory_bytes)
    with disk_errors("writing the token cache"):
        with closing(_Writer(folder / part_name(index))) as writer:
            for number, record in _records(order, folder / position_name(index), index, say):
                for example in tally.examples(record, number):
                    writer.add(example)
        _sync(folder / part_name(index))
        (folder / position_name(index)).unlink()
    return ShardReport(
        counts=tally.counts(),
        is_fast=tokenizer.fast,
        why_slow=tokenizer.why_slow,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _records(
    order: ShardOrder, position: Path, index: int, say: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[int, Record]]:
    start, end = order.ranges[index]
    decoder = msgspec.json.Decoder(RECORD_TYPES[order.kind])
    said = time.monotonic()
    with order.dataset.open("rb") as file, position.open("wb", buffering=0) as at:
        file.seek(start)
        done, number = 0, 0
        while done < end - start:
            line = file.readline()
            # Should this process die, the one that started it tells at which conversation.
            os.pwrite(at.fileno(), struct.pack("<Q", number), 0)
            grant_cpu(order.cpu_seconds)
            try:
                record = decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise no_record(number + 1, error) from error
            yield number, record
            done += len(line)
            number += 1
            if time.monotonic() - said > _SAY_SECONDS:
                say({"bytes": done})
                said = time.monotonic()
    say({"bytes": done})


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class _Writer:
    """Writes examples in record batches of a bounded size."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._file = pa.ipc.new_file(self._sink, SCHEMA)
        self._examples: list[Example] = []
        self._num_tokens = 0

    def add(self, example: Example) -> None:
        self._examples.append(example)
        self._num_tokens += len(example.tokens)
        if self._num_tokens >= _BATCH_TOKENS or len(self._examples) >= _BATCH_EXAMPLES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()
        self._sink.close()

    def _flush(self) -> None:
        examples, self._examples, self._num_tokens = self._examples, [], 0
        if not examples:
            return
        columns = [
            pa.array([example.line for example in examples], pa.uint32()),
            pa.array([num_supervised(example.mask) for example in examples], pa.uint32()),
            pa.array([example.unwritten for example in examples], pa.uint32()),
            _lists([example.tokens for example in examples], np.uint32),
            _lists([example.mask for example in examples], np.uint8),
            _lists([example.turns for example in examples], np.uint32),
        ]
        self._file.write_batch(pa.record_batch(columns, schema=SCHEMA))


def _lists(values: list[np.ndarray], dtype: type[np.generic]) -> pa.ListArray:
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.concatenate(values).astype(dtype, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
