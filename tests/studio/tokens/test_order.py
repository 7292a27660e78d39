"""The order of examples: a pure function of seed and step; mixtures by weight; packed rows."""

import math
import tracemalloc
from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.domain.train_spec import BatchSpec, TrainSpec
from studio.tokens.order import WINDOW_STEPS, Order, Part, Parts, Step

LENGTHS = [17 * index % 101 + 3 for index in range(50)]
LONGEST = 120


def order(batch: BatchSpec, lengths: Any = LENGTHS, *, parts: Parts = (), **train: Any) -> Order:
    spec = TrainSpec.model_validate(train)
    return Order(lengths, batch, spec, max_length_tokens=LONGEST, parts=parts)


def flat(steps: list[Step]) -> list[int]:
    return [index for step in steps for row in step for index in row]


BATCHES = (
    BatchSpec(micro_batch_size=2, gradient_accumulation_steps=2),
    BatchSpec(micro_batch_size=2, gradient_accumulation_steps=2, packing=True),
)


# ---- both ways --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_the_order_continues_from_any_cursor(batch: BatchSpec) -> None:
    lengths = np.random.default_rng(0).integers(3, 100, 2500)
    run = order(batch, lengths[:50], epochs=10)
    whole = list(run.steps())
    assert len(whole) == run.total_steps > 2 * WINDOW_STEPS
    for cursor in range(len(whole) + 2):
        assert list(run.steps(cursor)) == whole[cursor:]
    # Many windows in each epoch, and a part of one at the end.
    run = order(batch, lengths, epochs=2.3)
    whole = list(run.steps())
    for cursor in range(0, len(whole), 197):
        assert list(run.steps(cursor)) == whole[cursor:]


@pytest.mark.parametrize("batch", BATCHES)
def test_seeds_differ_and_repeat(batch: BatchSpec) -> None:
    def steps(seed: int) -> list[Step]:
        return list(order(batch, epochs=2, seed=seed).steps())

    assert steps(1) == steps(1)
    assert steps(1) != steps(2)
    first, second = np.array_split(flat(steps(1)), 2)
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("batch", BATCHES)
def test_max_steps_cuts_and_changes_nothing_before(batch: BatchSpec) -> None:
    whole = list(order(batch, epochs=4).steps())
    cut = order(batch, epochs=4, max_steps=7)
    assert cut.total_steps == 7
    assert list(cut.steps()) == whole[:7]
    assert order(batch, epochs=4, max_steps=10**6).total_steps == len(whole)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("gpus", "nodes", "ranks"), [(0, 1, 1), (1, 1, 1), (4, 1, 4), (2, 3, 6)])
def test_every_process_gets_its_accumulation(
    batch: BatchSpec, gpus: int, nodes: int, ranks: int
) -> None:
    run = order(batch, epochs=6, num_gpus=gpus, num_nodes=nodes)
    assert run.step_size == 2 * ranks
    assert {len(step) for step in run.steps()} == {2 * ranks}
    one = order(batch, epochs=6)
    assert run.total_steps == pytest.approx(one.total_steps / ranks, abs=1)


@st.composite
def runs(draw: st.DrawFn, packing: bool) -> tuple[Order, np.ndarray, Parts, int]:
    weights = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
    sizes = draw(st.lists(st.tuples(st.integers(1, 40), weights), min_size=1, max_size=3))
    parts = tuple(Part(num_examples=size, weight=weight) for size, weight in sizes)
    total = sum(part.num_examples for part in parts)
    lengths = draw(st.lists(st.integers(1, LONGEST), min_size=total, max_size=total))
    batch = BatchSpec(
        micro_batch_size=draw(st.integers(1, 4)),
        gradient_accumulation_steps=draw(st.integers(1, 5)),
        packing=packing,
    )
    epochs = draw(st.integers(1, 3))
    if not sum(part.per_epoch for part in parts):
        parts = (Part(num_examples=total),)
    train: Any = {
        "epochs": epochs,
        "seed": draw(st.integers(0, 9)),
        "num_gpus": draw(st.integers(0, 3)),
    }
    return order(batch, lengths, parts=parts, **train), np.array(lengths), parts, epochs


def wanted(parts: Parts, index: int) -> tuple[int, int]:
    """How often at least, and at most, an epoch holds an example."""
    for part in parts:
        if index < part.num_examples:
            return math.floor(part.weight), math.ceil(part.weight)
        index -= part.num_examples
    raise AssertionError(index)


@given(runs(packing=True))
def test_packed_epochs_hold_what_they_must_and_rows_what_they_can(
    run: tuple[Order, np.ndarray, Parts, int],
) -> None:
    made, lengths, parts, epochs = run
    steps = list(made.steps())
    assert len(steps) == made.total_steps
    assert made.row_tokens is not None
    rows = [row for step in steps for row in step]
    assert all(lengths[list(row)].sum() <= made.row_tokens for row in rows)
    assert all(rows)
    per_epoch = sum(part.per_epoch for part in parts)
    seen: list[int] = []
    ends = []
    for number, row in enumerate(rows, 1):
        seen += row
        if len(seen) % per_epoch == 0:
            ends.append(-(-number // made.step_size))
    # Epochs end with a row; the last step goes on into the next one.
    assert epochs * per_epoch <= len(seen)
    for epoch in range(epochs):
        held = Counter(seen[epoch * per_epoch : (epoch + 1) * per_epoch])
        for index in range(len(lengths)):
            least, most = wanted(parts, index)
            assert least <= held[index] <= most
    assert made.epoch_ends == set(ends[:epochs])
    assert max(made.epoch_ends) == made.total_steps


@given(runs(packing=False))
def test_padded_steps_hold_what_they_must(run: tuple[Order, np.ndarray, Parts, int]) -> None:
    made, lengths, parts, epochs = run
    steps = list(made.steps())
    per_epoch = sum(part.per_epoch for part in parts)
    width = len(steps[0][0])
    assert {len(row) for step in steps for row in step} == {width}
    assert made.total_steps == len(steps) == -(-epochs * per_epoch // (width * made.step_size))
    held = Counter(flat(steps))
    for index in range(len(lengths)):
        assert held[index] >= epochs * wanted(parts, index)[0]
    for step in steps:
        widths = [int(lengths[index]) for index in flat([step])]
        assert widths == sorted(widths, reverse=True), "memory peaks at once"


def test_an_epoch_without_examples_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no example"):
        order(BATCHES[0], [5], parts=(Part(num_examples=1, weight=0.1),))


# ---- padded -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_the_split_of_a_step_does_not_change_what_it_holds(micro: int, accumulation: int) -> None:
    batch = BatchSpec(micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    whole = BatchSpec(micro_batch_size=8, gradient_accumulation_steps=1)
    found = list(order(batch, epochs=3).steps())
    assert [flat([step]) for step in found] == [
        flat([step]) for step in order(whole, epochs=3).steps()
    ]
    assert all(len(step) == accumulation for step in found)


def test_every_epoch_holds_every_example_once() -> None:
    batch = BatchSpec(micro_batch_size=5, gradient_accumulation_steps=2)
    for epochs in (1, 2, 3):
        seen = sorted(flat(list(order(batch, epochs=epochs).steps())))
        assert seen == sorted(list(range(50)) * epochs)


def test_every_step_is_full_and_the_last_is_filled_from_the_next_epoch() -> None:
    batch = BatchSpec(micro_batch_size=8, gradient_accumulation_steps=2)
    steps = list(order(batch, epochs=1).steps())
    assert [len(flat([step])) for step in steps] == [16] * 4
    assert set(flat(steps)) == set(range(50))


def test_sorting_inside_a_window_saves_padding() -> None:
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=1)
    run = order(batch, epochs=8)
    assert 0.85 < run.efficiency() < 1
    assert order(BatchSpec(micro_batch_size=1), epochs=8).efficiency() == 1.0
    whole = BatchSpec(micro_batch_size=2, gradient_accumulation_steps=1)
    assert order(whole, [10, 30]).efficiency() == 40 / 60


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [(1, None, 4), (0.5, None, 2), (0.01, None, 1), (3, None, 10), (3, 7, 7), (3, 99, 10)],
)
def test_steps_are_counted(epochs: float, max_steps: int | None, steps: int) -> None:
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=4)
    limit: dict[str, Any] = {} if max_steps is None else {"max_steps": max_steps}
    run = order(batch, epochs=epochs, **limit)
    assert run.total_steps == len(list(run.steps())) == steps


def test_rounding_adds_no_step() -> None:
    batch = BatchSpec(micro_batch_size=1, gradient_accumulation_steps=3)
    assert math.ceil(30 * 0.1) == 3
    assert order(batch, [5] * 30, epochs=0.1).total_steps == 1


def test_epochs_end_at_whole_steps_and_with_the_run() -> None:
    batch = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=1)
    assert order(batch, epochs=3).epoch_ends == {13, 25, 38}
    assert order(batch, epochs=2.5).epoch_ends == {13, 25, 32}
    assert order(batch, epochs=3, max_steps=20).epoch_ends == {13, 20}
    assert order(BatchSpec(), [5], epochs=0.5).epoch_ends == {1}


def test_fewer_examples_than_a_step_are_repeated() -> None:
    batch = BatchSpec(micro_batch_size=2, gradient_accumulation_steps=4)
    assert list(order(batch, [5]).steps()) == [((0, 0),) * 4]


# ---- packed -----------------------------------------------------------------------------------


def chat_lengths(count: int, longest: int) -> np.ndarray:
    """Lengths as published chats have them: log-normal, mean 600, sigma 0.8."""
    source = np.random.default_rng(0)
    found = np.exp(source.normal(np.log(600) - 0.8**2 / 2, 0.8, count))
    return np.clip(found, 16, longest).astype(np.uint32)


@pytest.mark.parametrize("room", [2048, 4096, 8192])
def test_rows_of_chats_are_full(room: int) -> None:
    batch = BatchSpec(micro_batch_size=1, packing=True)
    lengths = chat_lengths(20_000, room)
    run = Order(lengths, batch, TrainSpec(), max_length_tokens=room)
    assert run.efficiency() > 0.98
    padded = BatchSpec(micro_batch_size=8)
    assert (
        run.efficiency() > Order(lengths, padded, TrainSpec(), max_length_tokens=room).efficiency()
    )


def test_length_is_no_curriculum() -> None:
    """Best-fit makes the rows of the longest examples first; training may not meet them so."""
    batch = BatchSpec(micro_batch_size=1, gradient_accumulation_steps=1, packing=True)
    lengths = chat_lengths(4000, 4096)
    run = Order(lengths, batch, TrainSpec(), max_length_tokens=4096)
    counts = np.array([len(row) for step in run.steps() for row in step])
    thirds = [part.mean() for part in np.array_split(counts[:145], 3)]
    assert max(thirds) / min(thirds) < 1.4
    place = np.corrcoef(np.arange(145), counts[:145])[0, 1]
    assert abs(place) < 0.25


def test_other_epochs_put_other_examples_together() -> None:
    batch = BatchSpec(micro_batch_size=1, gradient_accumulation_steps=1, packing=True)
    run = Order(chat_lengths(3000, 4096), batch, TrainSpec(epochs=2), max_length_tokens=4096)
    rows = [frozenset(row) for step in run.steps() for row in step if len(row) > 1]
    assert len(set(rows)) > 0.97 * len(rows)


def test_a_part_of_an_epoch_is_a_part_of_its_rows() -> None:
    batch = BatchSpec(micro_batch_size=1, gradient_accumulation_steps=1, packing=True)
    lengths = chat_lengths(3000, 4096)
    steps = {
        epochs: Order(lengths, batch, TrainSpec(epochs=epochs), max_length_tokens=4096).total_steps
        for epochs in (0.25, 1, 1.25)
    }
    assert steps[0.25] == math.ceil(steps[1] / 4)
    assert steps[1.25] == pytest.approx(1.25 * steps[1], abs=2)


def test_an_example_that_is_too_long_stands_alone() -> None:
    """A run refuses it before; the page counts steps all the same."""
    batch = BatchSpec(micro_batch_size=1, gradient_accumulation_steps=1, packing=True)
    run = order(batch, [500, 60, 60, LONGEST])
    assert sorted(sorted(row) for step in run.steps() for row in step) == [[0], [1, 2], [3]]
    assert run.efficiency() == 1.0


@pytest.mark.parametrize("packing", [False, True])
def test_many_examples_need_little_memory(packing: bool) -> None:
    lengths = chat_lengths(200_000, 2048)
    batch = BatchSpec(micro_batch_size=2, packing=packing)
    tracemalloc.start()
    run = Order(lengths, batch, TrainSpec(), max_length_tokens=2048)
    middle = next(run.steps(run.total_steps // 2))
    assert len(middle) == 4
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # An epoch takes 0.8 MB, and as much while it is made; a list of Python numbers would take 7.
    assert peak < 4e6


# ---- mixtures ---------------------------------------------------------------------------------


def epochs_of(parts: Parts, count: int, seed: int = 1) -> list[Counter[int]]:
    per_epoch = sum(part.per_epoch for part in parts)
    batch = BatchSpec(gradient_accumulation_steps=1)
    stream = flat(list(order(batch, [1] * 50, epochs=count, seed=seed, parts=parts).steps()))
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
    drawn = epochs_of(parts, 2)
    for epoch in drawn:
        counts = [epoch[index] for index in range(48)]
        assert counts[:18] == [1] * 18
        assert sorted(counts[18:28]) == [2] * 5 + [3] * 5
        assert sorted(counts[28:]) == [0] * 15 + [1] * 5
    assert drawn[0] != drawn[1], "each epoch draws anew"
    assert drawn == epochs_of(parts, 2)
    assert drawn != epochs_of(parts, 2, seed=2)


@pytest.mark.parametrize("batch", BATCHES)
def test_one_part_of_weight_one_changes_nothing(batch: BatchSpec) -> None:
    mixed = list(order(batch, epochs=3, parts=(Part(num_examples=50),)).steps())
    assert mixed == list(order(batch, epochs=3).steps())
    assert set(chain.from_iterable(chain.from_iterable(mixed))) == set(range(50))
