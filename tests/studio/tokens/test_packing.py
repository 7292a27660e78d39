"""Best-fit decreasing, against its definition and its bound."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from studio.tokens.packing import packing

LENGTHS = st.lists(st.integers(1, 60), max_size=60)


def plain_best_fit(lengths: list[int], room: int) -> int:
    """Best-fit decreasing as a textbook has it, one example at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [left for left in rooms if left >= length]
        if fits:
            rooms.remove(min(fits))
            rooms.append(min(fits) - length)
        else:
            rooms.append(room - length)
    return len(rooms)


@given(LENGTHS, st.integers(1, 60))
def test_it_is_best_fit_decreasing(lengths: list[int], room: int) -> None:
    fitting = [length for length in lengths if length <= room]
    packed = packing(np.array(lengths, dtype=np.uint32), room)
    assert packed.bins == plain_best_fit(fitting, room)
    assert packed.num_too_long == len(lengths) - len(fitting)
    if fitting:
        assert packed.efficiency == sum(fitting) / (packed.bins * room)
        least = -(-sum(fitting) // room)
        assert packed.bins >= least


def test_nothing_needs_no_bins() -> None:
    packed = packing(np.zeros(0, dtype=np.uint32), 512)
    assert (packed.bins, packed.efficiency) == (0, 0.0)


def test_pairs_that_fill_a_bin_are_found() -> None:
    packed = packing(np.array([300, 212] * 50, dtype=np.uint32), 512)
    assert (packed.bins, packed.efficiency) == (50, 1.0)


def test_a_million_examples_take_a_moment() -> None:
    lengths = np.random.default_rng(1).integers(1, 4096, 1_000_000).astype(np.uint32)
    start = time.perf_counter()
    packed = packing(lengths, 4096)
    assert time.perf_counter() - start < 10
    assert packed.efficiency > 0.99
