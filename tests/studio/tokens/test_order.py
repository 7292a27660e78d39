"""The order of examples: a pure function of seed and step; mixtures by weight."""

import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from studio.domain.train_spec import BatchSpec, TrainSpec
from studio.tokens.order import (
    WINDOW_STEPS,
    Part,
    count_steps,
    epoch_ends,
    padding_efficiency,
    step_order,
)

LENGTHS = [17 * index % 101 + 3 for index in range(50)]


def order(batch: BatchSpec, first_step: int = 0, **train: float) -> list[tuple[int, ...]]:
    return list(step_order(LENGTHS, batch, TrainSpec.model_validate(train), first_step))


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_the_split_of_a_step_does_not_change_what_it_holds(micro: int, accumulation: int) -> None:
    batch = BatchSpec(micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    whole = BatchSpec(micro_batch_size=8, gradient_accumulation_steps=1)
    assert order(batch, epochs=3) == order(whole, epochs=3)


def test_the_order_continues_from_any_cursor() -> None:
    batch = BatchSpec(micro_batch_size=2, gradient_accumulation_steps=2)
    whole = order(batch, epochs=3)
    assert len(whole) > 2 * WINDOW_STEPS
    for cursor in range(len(whole) + 1):
        assert order(batch, cursor, epochs=3) == whole[cursor:]


def test_every_epoch_holds_every_example_once() -> None:
    batch = BatchSpec(micro_batch_size=5, gradient_accumulation_steps=2)
    for epochs in (1, 2, 3):
        seen = sorted(chain.from_iterable(order(batch, epochs=epochs)))
        assert seen == sorted(list(range(50)) * epochs)


def test_every_step_is_full_and_the_last_is_filled_from_the_next_epoch() -> None:
    batch = BatchSpec(micro_batch_size=8, gradient_accumulation_steps=2)
    steps = order(batch, epochs=1)
    assert [len(step) for step in steps] == [16] * 4
    assert set(chain.from_iterable(steps)) == set(range(50))


def test_seeds_differ_and_repeat() -> None:
    batch = BatchSpec(micro_batch_size=4)
    assert order(batch, epochs=2, seed=1) == order(batch, epochs=2, seed=1)
    assert order(batch, epochs=2, seed=1) != order(batch, epochs=2, seed=2)


def test_max_steps_cuts_and_changes_nothing_before() -> None:
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=1)
    assert order(batch, epochs=3, max_steps=7) == order(batch, epochs=3)[:7]


def test_sorting_inside_a_window_saves_padding() -> None:
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=1)
    steps = order(batch, epochs=8)
    width = sum(4 * max(LENGTHS[index] for index in step) for step in steps)
    real = sum(LENGTHS[index] for step in steps for index in step)
    assert real / width > 0.85


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [(1, None, 4), (0.5, None, 2), (0.01, None, 1), (3, None, 10), (3, 7, 7), (3, 99, 10)],
)
def test_steps_are_counted(epochs: float, max_steps: int | None, steps: int) -> None:
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=4)
    train = TrainSpec(epochs=epochs, max_steps=max_steps)
    assert count_steps(50, batch, train) == steps
    assert len(list(step_order(LENGTHS, batch, train))) == steps


def test_rounding_adds_no_step() -> None:
    batch = BatchSpec(micro_batch_size=1, gradient_accumulation_steps=3)
    assert math.ceil(30 * 0.1) == 3
    assert count_steps(30, batch, TrainSpec(epochs=0.1)) == 1


def test_epochs_end_at_whole_steps_and_with_the_run() -> None:
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=1)
    assert epoch_ends(50, batch, TrainSpec(epochs=3)) == {13, 25, 38}
    assert epoch_ends(50, batch, TrainSpec(epochs=2.5)) == {13, 25, 32}
    assert epoch_ends(50, batch, TrainSpec(epochs=3, max_steps=20)) == {13, 20}
    assert epoch_ends(1, BatchSpec(), TrainSpec(epochs=0.5)) == {1}


def test_fewer_examples_than_a_step_are_repeated() -> None:
    batch = BatchSpec(micro_batch_size=2, gradient_accumulation_steps=4)
    assert list(step_order([5], batch, TrainSpec())) == [(0,) * 8]


# ---- mixtures ---------------------------------------------------------------------------------

PARTS = (
    Part(num_examples=20, weight=1.0),
    Part(num_examples=10, weight=2.5),
    Part(num_examples=20, weight=0.25),
)


def epochs(parts: tuple[Part, ...], count: int, seed: int = 1) -> list[Counter[int]]:
    per_epoch = sum(part.per_epoch for part in parts)
    train, batch = TrainSpec(epochs=count, seed=seed), BatchSpec(gradient_accumulation_steps=1)
    stream = list(chain.from_iterable(step_order([1] * 50, batch, train, parts=parts)))
    assert len(stream) == count * per_epoch
    # Steps are shuffled within windows of 8, which divide these epochs.
    assert per_epoch % WINDOW_STEPS == 0
    return [Counter(stream[at : at + per_epoch]) for at in range(0, len(stream), per_epoch)]


def test_an_epoch_of_a_mixture_holds_each_part_by_its_weight() -> None:
    parts = (
        Part(num_examples=18),
        Part(num_examples=10, weight=2.5),
        Part(num_examples=20, weight=0.25),
    )
    assert [part.per_epoch for part in parts] == [18, 25, 5]
    drawn = epochs(parts, 2)
    for epoch in drawn:
        counts = [epoch[index] for index in range(48)]
        assert counts[:18] == [1] * 18
        assert sorted(counts[18:28]) == [2] * 5 + [3] * 5
        assert sorted(counts[28:]) == [0] * 15 + [1] * 5
    assert drawn[0] != drawn[1], "each epoch draws anew"
    assert drawn == epochs(parts, 2)
    assert drawn != epochs(parts, 2, seed=2)


def test_one_part_of_weight_one_changes_nothing() -> None:
    batch, train = BatchSpec(micro_batch_size=4), TrainSpec(epochs=3)
    mixed = list(step_order(LENGTHS, batch, train, parts=(Part(num_examples=50),)))
    assert mixed == list(step_order(LENGTHS, batch, train))


def test_the_order_of_a_mixture_continues_from_any_cursor() -> None:
    batch, train = BatchSpec(micro_batch_size=3), TrainSpec(epochs=4)
    whole = list(step_order(LENGTHS, batch, train, parts=PARTS))
    for cursor in (0, 1, WINDOW_STEPS, len(whole) - 1):
        assert list(step_order(LENGTHS, batch, train, cursor, parts=PARTS)) == whole[cursor:]


def test_padding_is_that_of_the_micro_batches() -> None:
    lengths = np.array(LENGTHS, dtype=np.uint32)
    train = TrainSpec(epochs=8)
    assert padding_efficiency(lengths, BatchSpec(micro_batch_size=1), train) == 1.0
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=1)
    assert 0.85 < padding_efficiency(lengths, batch, train) < 1.0
    unequal = np.array([10, 30], dtype=np.uint32)
    whole = BatchSpec(micro_batch_size=2, gradient_accumulation_steps=1)
    assert padding_efficiency(unequal, whole, TrainSpec()) == 40 / 60
