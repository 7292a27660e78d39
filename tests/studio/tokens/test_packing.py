"""Best-fit decreasing, against its definition and its bound, and windows of a stream."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.tokens.packing import WINDOW_EXAMPLES, pack, packing, window_edges

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
    assert packed.efficiency > 0.98


@given(LENGTHS.filter(bool), st.integers(1, 60))
def test_rows_hold_each_example_once_and_no_more_than_fits(lengths: list[int], room: int) -> None:
    rows = pack(np.array(lengths, dtype=np.uint32), room)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    for row in rows:
        widths = [lengths[place] for place in row]
        assert sum(widths) <= room or len(widths) == 1
        assert widths == sorted(widths, reverse=True)


@given(st.integers(0, 10_000), st.floats(1, 900), st.integers(1, 9000))
def test_windows_cover_all_and_none_is_a_rest(num: int, mean: float, room: int) -> None:
    edges = window_edges(num, mean, room)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1]) == (0, num)
    assert sizes.max() - sizes.min() <= 1
    if len(sizes) > 1:
        assert sizes.min() >= WINDOW_EXAMPLES // 2


def test_the_order_of_a_dataset_changes_no_figure() -> None:
    lengths = np.random.default_rng(1).integers(1, 900, 20_000).astype(np.uint32)
    mixed, by_length = packing(lengths, 1024), packing(np.sort(lengths), 1024)
    assert mixed.efficiency > 0.97
    assert abs(by_length.efficiency - mixed.efficiency) < 0.005


@pytest.mark.parametrize("room", [2048, 4096, 8192])
def test_chats_fill_their_rows(room: int) -> None:
    """Lengths as published chats have them: log-normal, mean 600, sigma 0.8."""
    source = np.random.default_rng(0)
    lengths = np.exp(source.normal(np.log(600) - 0.8**2 / 2, 0.8, 20_000))
    packed = packing(np.clip(lengths, 16, room).astype(np.uint32), room)
    assert packed.efficiency > 0.98
