"""Which examples make which step of a run; the cursor is the number of steps done.

The order is a pure function of seed and step: an endless stream of shuffled epochs, cut into
windows of a few steps. Inside a window the examples are sorted by length, so that a micro-batch
holds little padding, and the steps of the window are shuffled, so that length is no curriculum.
The split of a step into micro-batches changes neither its examples nor its loss.

An epoch of a mixture holds floor(w) copies of each example of a Dataset of weight w, and of a
seeded choice of them, drawn anew for each epoch, one more: so every epoch has the same size.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

from studio.domain.train_spec import BatchSpec, TrainSpec

WINDOW_STEPS = 8
# A figure of the padding needs no more examples than this.
_SAMPLE = 200_000


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

    def draw(self, first: int, random_source: random.Random) -> list[int]:
        """Return its examples in one epoch.

        Args:
            first: Number of its first example.
            random_source: Decides which of them come once more.
        """
        everything = range(first, first + self.num_examples)
        drawn = [number for _ in range(self._copies) for number in everything]
        return drawn + sorted(random_source.sample(everything, self._more))


Parts = tuple[Part, ...]


def count_steps(num_examples: int, batch: BatchSpec, train: TrainSpec) -> int:
    """Return the optimizer steps of a run: epochs, rounded up to whole steps, or max_steps.

    Args:
        num_examples: Examples of an epoch.
        batch: Micro-batch size times accumulation make a step.
        train: Epochs, and the most steps.
    """
    steps = _steps_of(train.epochs, num_examples, batch)
    return steps if train.max_steps is None else min(steps, train.max_steps)


def epoch_ends(num_examples: int, batch: BatchSpec, train: TrainSpec) -> set[int]:
    """Return the steps at which an epoch is over; the last step of the run is always one."""
    last = count_steps(num_examples, batch, train)
    ends = (_steps_of(epoch, num_examples, batch) for epoch in range(1, math.ceil(train.epochs)))
    return {end for end in ends if end < last} | {last}


def step_order(
    lengths: Sequence[int] | np.ndarray,
    batch: BatchSpec,
    train: TrainSpec,
    first_step: int = 0,
    *,
    parts: Parts = (),
) -> Iterator[tuple[int, ...]]:
    """Yield the examples of each step of a run.

    Args:
        lengths: Tokens of each example.
        batch: Micro-batch size times accumulation make a step.
        train: Its seed decides the order, its epochs and max_steps the end.
        first_step: Steps to leave out: the cursor of a Checkpoint.
        parts: The Datasets whose examples `lengths` holds, one after the other; one of weight 1
            is meant when it is empty.

    Yields:
        Indices into `lengths`, longest example first, so that memory peaks at once.
    """
    parts = parts or (Part(num_examples=len(lengths)),)
    size, per_epoch = _step_size(batch), sum(part.per_epoch for part in parts)
    # max_steps cuts the run short; it does not change what the steps before it hold.
    end = _steps_of(train.epochs, per_epoch, batch)
    last = count_steps(per_epoch, batch, train)
    for start in range(first_step - first_step % WINDOW_STEPS, last, WINDOW_STEPS):
        steps = range(start, min(start + WINDOW_STEPS, end))
        stream = _stream(parts, train.seed, range(steps.start * size, steps.stop * size))
        stream.sort(key=lambda index: (-int(lengths[index]), index))
        window = [tuple(stream[at : at + size]) for at in range(0, len(stream), size)]
        random.Random(f"window {train.seed} {start}").shuffle(window)
        yield from window[max(0, first_step - start) : last - start]


def padding_efficiency(
    lengths: np.ndarray, batch: BatchSpec, train: TrainSpec, parts: Parts = ()
) -> float:
    """Return the share of real tokens in the micro-batches of a run, from its first steps."""
    real = padded = 0
    steps = step_order(lengths, batch, train, parts=parts)
    for step in islice(steps, max(1, _SAMPLE // _step_size(batch))):
        for at in range(0, len(step), batch.micro_batch_size):
            widths = [int(lengths[index]) for index in step[at : at + batch.micro_batch_size]]
            real += sum(widths)
            padded += len(widths) * max(widths)
    return real / padded if padded else 0.0


def _step_size(batch: BatchSpec) -> int:
    return batch.micro_batch_size * batch.gradient_accumulation_steps


def _steps_of(epochs: float, num_examples: int, batch: BatchSpec) -> int:
    # 1e-9: 0.1 epochs of 30 examples are 3 examples, not 3.0000000000000004.
    return max(1, math.ceil(num_examples * epochs / _step_size(batch) - 1e-9))


def _stream(parts: Parts, seed: int, positions: range) -> list[int]:
    per_epoch = sum(part.per_epoch for part in parts)
    stream = []
    for position in positions:
        epoch, place = divmod(position, per_epoch)
        stream.append(_epoch_order(parts, seed, epoch)[place])
    return stream


@lru_cache(maxsize=4)
def _epoch_order(parts: Parts, seed: int, epoch: int) -> tuple[int, ...]:
    order, first = list[int](), 0
    for number, part in enumerate(parts):
        order += part.draw(first, random.Random(f"part {number} {seed} {epoch}"))
        first += part.num_examples
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)
