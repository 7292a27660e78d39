"""Which examples make which step of a run, and which micro-batch of it.

The order is a pure function of seed and step, so the cursor of a Checkpoint is the number of
steps done. Below it lies an endless stream of shuffled epochs.

Without packing a micro-batch is `micro_batch_size` examples, padded. The stream is cut into
windows of a few steps; inside a window the examples are sorted by length, so that a micro-batch
holds little padding, and the steps of the window are shuffled, so that length is no curriculum.

With packing a micro-batch is one row of `micro_batch_size` times the longest example allowed,
filled with whole examples (studio.tokens.packing). Each epoch is cut into windows, and the rows
of a window are shuffled: best-fit makes those of long examples first.

Every step is full; the last one of a run is filled from the next epoch. An epoch of a mixture
holds floor(w) copies of each example of a Dataset of weight w, and of a seeded choice of them,
drawn anew for each epoch, one more: so every epoch has the same size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, islice, pairwise

import numpy as np

from studio.domain.train_spec import BatchSpec, TrainSpec
from studio.tokens.packing import count_rows, pack, window_edges

WINDOW_STEPS = 8
# A figure of the padding needs no more examples than this.
_SAMPLE = 200_000

MicroBatch = tuple[int, ...]
Step = tuple[MicroBatch, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A Dataset of a mixture.

    Attributes:
        num_examples: Its examples.
        weight: How often an epoch holds each of them.
    """

    num_examples: int
    weight: float = 1.0

    @property
    def per_epoch(self) -> int:
        """Examples of it in one epoch."""
        return self._copies * self.num_examples + self._more

    @property
    def _copies(self) -> int:
        # 1e-9: a weight that was computed, as 3 * (1 / 3), is meant whole.
        return math.floor(self.weight + 1e-9)

    @property
    def _more(self) -> int:
        return round(max(0.0, self.weight - self._copies) * self.num_examples)

    def draw(self, first: int, random_source: np.random.RandomState) -> np.ndarray:
        """Return its examples in one epoch, (per_epoch,), int32.

        Args:
            first: Number of its first example.
            random_source: Decides which of them come once more.
        """
        everything = np.arange(first, first + self.num_examples, dtype=np.int32)
        drawn = np.tile(everything, self._copies)
        if not self._more:
            return drawn
        random_source.shuffle(everything)
        return np.concatenate([drawn, everything[: self._more]])


Parts = tuple[Part, ...]


class Order:
    """What each step of a run trains on.

    Memory is that of the lengths and, while the steps are read, 4 bytes for each example of two
    epochs.

    Args:
        lengths: Tokens of each example.
        batch: Micro-batch size, accumulation and packing.
        train: Its seed decides the order, its epochs and max_steps the end; each process (GPUs
            times machines, at least 1) gets `gradient_accumulation_steps` micro-batches a step.
        max_length_tokens: Longest example: with packing a row is `micro_batch_size` times that.
        parts: The Datasets whose examples `lengths` holds, one after the other; one of weight 1
            is meant when it is empty.

    Attributes:
        step_size: Micro-batches of a step, over all processes.
        row_tokens: Most tokens of a packed micro-batch; None without packing.
        total_steps: Optimizer steps of the run: epochs, rounded up to whole steps, or max_steps.
        epoch_ends: Steps at which an epoch is over; the last step of the run is always one.

    Raises:
        ValueError: An epoch holds no example.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch: BatchSpec,
        train: TrainSpec,
        *,
        max_length_tokens: int,
        parts: Parts = (),
    ) -> None:
        self._lengths = np.asarray(lengths)
        self._batch, self._train = batch, train
        self._epochs = _Epochs(parts or (Part(num_examples=len(lengths)),), train.seed)
        if not self._epochs.size:
            raise ValueError("an epoch holds no example")
        ranks = max(1, train.num_gpus) * train.num_nodes
        self.step_size = batch.gradient_accumulation_steps * ranks
        self.row_tokens = batch.micro_batch_size * max_length_tokens if batch.packing else None
        mean = float(self._lengths.mean())
        self._edges = window_edges(self._epochs.size, mean, self.row_tokens or 1)
        # Rows until the end of each window.
        self._window_ends = np.zeros(0, dtype=np.int64)
        # How many of what is counted make a step: rows where they are packed, else examples.
        self._unit = self.step_size * (1 if batch.packing else batch.micro_batch_size)
        ends = self._count_packed() if batch.packing else self._count_padded()
        steps = [self._steps_for(end) for end in ends]
        self._all_steps = steps[-1]
        self.total_steps = min(steps[-1], train.max_steps or steps[-1])
        self.epoch_ends = {end for end in steps if end < self.total_steps} | {self.total_steps}

    def steps(self, first_step: int = 0) -> Iterator[Step]:
        """Yield the micro-batches of each step, as indices of examples.

        Process r of W takes micro-batches r, r + W, r + 2 W, ... of a step.

        Args:
            first_step: Steps to leave out: the cursor of a Checkpoint.
        """
        steps = self._packed(first_step) if self._batch.packing else self._padded(first_step)
        return islice(steps, max(0, self.total_steps - first_step))

    def efficiency(self) -> float:
        """Return the share of real tokens in the micro-batches, from the first steps of the run.

        What is left is padding, or, with packing, room that no example fits into.
        """
        real = room = seen = 0
        for step in self.steps():
            for micro_batch in step:
                widths = self._lengths[list(micro_batch)].astype(np.int64)
                real += int(widths.sum())
                room += max(self.row_tokens or len(widths) * int(widths.max()), int(widths.sum()))
                seen += len(widths)
            if seen >= _SAMPLE:
                break
        return real / room if room else 0.0

    def _steps_for(self, units: float) -> int:
        # 1e-9: 0.1 epochs of 30 examples are 3 examples, not 3.0000000000000004.
        return max(1, math.ceil(units / self._unit - 1e-9))

    def _count_padded(self) -> list[float]:
        """Return the examples seen at the end of each epoch, and of the run."""
        epochs = self._train.epochs
        return [min(epoch, epochs) * self._epochs.size for epoch in range(1, math.ceil(epochs) + 1)]

    def _count_packed(self) -> list[float]:
        """Return the rows seen at the end of each epoch, and of the run; count those of windows."""
        ends, counts, total = list[float](), list[int](), 0
        for epoch in range(math.ceil(self._train.epochs - 1e-9)):
            share = min(1.0, self._train.epochs - epoch)
            rows = [
                count_rows(self._lengths[window], self._row_tokens)
                for window in self._epoch_windows(epoch)
            ]
            counts += rows
            ends.append(total + share * sum(rows))
            total += sum(rows)
            if self._train.max_steps and total >= self._train.max_steps * self._unit:
                break
        self._window_ends = np.cumsum(counts)
        return ends

    @property
    def _row_tokens(self) -> int:
        assert self.row_tokens is not None
        return self.row_tokens

    def _padded(self, first_step: int) -> Iterator[Step]:
        size, width = self._unit, self._batch.micro_batch_size
        for start in count(first_step - first_step % WINDOW_STEPS, WINDOW_STEPS):
            # max_steps cuts the run short; it does not change what the steps before it hold.
            stop = min(start + WINDOW_STEPS, self._all_steps)
            stream = self._epochs.span(start * size, stop * size)
            longest_first = np.lexsort((stream, -self._lengths[stream].astype(np.int64)))
            window = stream[longest_first].reshape(stop - start, size)
            shuffled = _source(f"window {self._train.seed} {start}").permutation(stop - start)
            # Longest example of a step first, so that memory peaks at once.
            for step in window[shuffled][max(0, first_step - start) :].tolist():
                yield tuple(tuple(step[at : at + width]) for at in range(0, size, width))

    def _packed(self, first_step: int) -> Iterator[Step]:
        first = first_step * self._unit
        window = int(np.searchsorted(self._window_ends, first, side="right"))
        passed = int(self._window_ends[window - 1]) if window else 0
        rows = islice(self._rows(window), first - passed, None)
        while True:
            yield tuple(islice(rows, self._unit))

    def _rows(self, first_window: int) -> Iterator[MicroBatch]:
        """Yield the rows of an endless run from a window on."""
        first_epoch, skipped = divmod(first_window, len(self._edges) - 1)
        for epoch in count(first_epoch):
            for number, window in enumerate(self._epoch_windows(epoch)):
                if epoch == first_epoch and number < skipped:
                    continue
                rows = pack(self._lengths[window], self._row_tokens)
                source = _source(f"rows {self._train.seed} {epoch} {number}")
                for row in source.permutation(len(rows)).tolist():
                    yield tuple(window[rows[row]].tolist())

    def _epoch_windows(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the examples of each window of an epoch."""
        examples = self._epochs.order(epoch)
        for start, end in pairwise(self._edges):
            yield examples[start:end]


class _Epochs:
    """The shuffled epochs of some Datasets.

    Args:
        parts: The Datasets.
        seed: Of the run.

    Attributes:
        size: Examples of each epoch.
    """

    def __init__(self, parts: Parts, seed: int) -> None:
        self._parts, self._seed = parts, seed
        self._kept: dict[int, np.ndarray] = {}
        self.size = sum(part.per_epoch for part in parts)

    def order(self, epoch: int) -> np.ndarray:
        """Return the examples of an epoch, (size,), int32."""
        if epoch not in self._kept:
            # A window without packing may lie in two epochs, hardly ever in more.
            while len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
            self._kept[epoch] = self._shuffled(epoch)
        return self._kept[epoch]

    def span(self, start: int, stop: int) -> np.ndarray:
        """Return a part of the endless stream of epochs, (stop - start,), int32."""
        pieces = []
        for epoch in range(start // self.size, -(-stop // self.size)):
            first = epoch * self.size
            pieces.append(self.order(epoch)[max(0, start - first) : stop - first])
        return np.concatenate(pieces)

    def _shuffled(self, epoch: int) -> np.ndarray:
        pieces, first = list[np.ndarray](), 0
        for number, part in enumerate(self._parts):
            pieces.append(part.draw(first, _source(f"part {number} {self._seed} {epoch}")))
            first += part.num_examples
        order = np.concatenate(pieces)
        _source(f"epoch {self._seed} {epoch}").shuffle(order)
        return order


def _source(name: str) -> np.random.RandomState:
    """Return the random source of a name.

    The older generator on purpose: its numbers never change again
    (https://numpy.org/doc/stable/reference/random/compatibility.html), and a resumed run must
    draw the same under a later numpy.
    """
    return np.random.RandomState(np.frombuffer(sha256(name.encode()).digest(), dtype=np.uint32))
