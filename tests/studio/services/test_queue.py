"""The queue: order, priority, hold, start later, behind another; and why each Run waits."""

import itertools
import time
from typing import cast

import pytest

from studio.dispatch import Bell
from studio.domain.run import RunState
from studio.errors import ConflictError, InputError, NotFoundError
from studio.services import queue, runs, waiting
from studio.services.queue import Order
from studio.services.studio import Studio
from studio.store.rows import RunRow
from tests.fakes import FakeDispatch
from tests.studio.queued import add_worker, card, end, example_spec, start, submit


def order(studio: Studio) -> list[int]:
    return [one.row.id for one in waiting.overview(studio).waiting]


def why(studio: Studio) -> dict[int, str]:
    return {one.row.id: one.why for one in waiting.overview(studio).waiting}


def on_gpus(studio: Studio, count: int, gib: float | None = None) -> int:
    number = submit(studio, train={"num_gpus": count})
    with studio.database.write() as session:
        session.get_one(RunRow, number).needs_gib = gib
    return number


# ---- order ------------------------------------------------------------------------------------


def test_runs_stand_in_the_order_of_their_arrival_and_can_be_moved(studio: Studio) -> None:
    one, two, three = (submit(studio) for _ in range(3))
    assert order(studio) == [one, two, three]
    queue.move_up(studio, three)
    assert order(studio) == [one, three, two]
    queue.move_down(studio, one)
    assert order(studio) == [three, one, two]
    queue.move_first(studio, two)
    assert order(studio) == [two, three, one]
    queue.move_before(studio, one, three)
    assert order(studio) == [two, one, three]
    queue.move_up(studio, two)
    queue.move_down(studio, three)
    assert order(studio) == [two, one, three]


def test_a_higher_priority_goes_first_and_moving_past_it_takes_it_over(studio: Studio) -> None:
    low, high = submit(studio), submit(studio)
    queue.set_priority(studio, high, 5)
    assert order(studio) == [high, low]
    assert queue.move_first(studio, low).priority == 5
    assert order(studio) == [low, high]
    queue.set_priority(studio, low, -1)
    assert order(studio) == [high, low]
    assert queue.move_down(studio, high).priority == -1
    assert order(studio) == [low, high]


def test_every_order_can_be_reached_by_moves_and_is_kept(studio: Studio) -> None:
    numbers = [submit(studio) for _ in range(4)]
    for number, priority in zip(numbers, (0, 0, 3, 3), strict=True):
        queue.set_priority(studio, number, priority)
    for wanted in itertools.permutations(numbers):
        for number in reversed(wanted):
            queue.move_first(studio, number)
        assert tuple(order(studio)) == wanted


def test_places_are_numbered_anew_before_halving_them_ends(studio: Studio) -> None:
    one, two, three = (submit(studio) for _ in range(3))
    for _ in range(25):
        queue.move_before(studio, three, two)
        queue.move_before(studio, two, three)
        assert order(studio) == [one, two, three]


@pytest.mark.parametrize("priority", [-101, 101])
def test_a_priority_has_limits(studio: Studio, priority: int) -> None:
    number = submit(studio)
    with pytest.raises(InputError, match="out of range"):
        queue.set_priority(studio, number, priority)


def test_what_is_not_queued_has_no_place(studio: Studio) -> None:
    number, other = submit(studio), submit(studio)
    start(studio, number)
    with pytest.raises(ConflictError, match="is RUNNING"):
        queue.move_first(studio, number)
    with pytest.raises(ConflictError, match="is RUNNING"):
        queue.move_before(studio, other, number)
    with pytest.raises(NotFoundError, match="no run 99"):
        queue.move_up(studio, 99)
    with pytest.raises(InputError, match="before itself"):
        queue.move_before(studio, other, other)


# ---- what keeps a Run -------------------------------------------------------------------------


def test_orders_that_make_no_sense_store_nothing(studio: Studio) -> None:
    spec = example_spec(studio)
    for wrong, words in (
        (Order(priority=1000), "out of range"),
        (Order(start_after=time.time() - 60), "in the past"),
        (Order(after_run_id=99), "no run 99"),
    ):
        with pytest.raises(InputError, match=words):
            runs.submit(studio, spec, wrong)
    assert runs.listing(studio) == []


def test_a_run_can_be_launched_with_an_order(studio: Studio) -> None:
    first, later = submit(studio), time.time() + 3600
    order = Order(priority=3, start_after=later, after_run_id=first, is_held=True)
    row = runs.submit(studio, example_spec(studio), order)
    assert (row.priority, row.start_after, row.after_run_id) == (3, later, first)
    assert row.is_held


def test_a_run_waits_neither_for_itself_nor_in_a_circle(studio: Studio) -> None:
    one, two, three = (submit(studio) for _ in range(3))
    with pytest.raises(InputError, match="wait for itself"):
        queue.wait_for(studio, one, one)
    queue.wait_for(studio, two, one)
    queue.wait_for(studio, three, two)
    with pytest.raises(InputError, match=f"run {three}, which waits for run {two}"):
        queue.wait_for(studio, one, three)
    queue.wait_for(studio, two, None)
    assert queue.wait_for(studio, one, three).after_run_id == three


def test_the_queue_has_an_end(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "MAX_QUEUED", 2)
    first = submit(studio)
    runs.stop(studio, first)
    submit(studio)
    submit(studio)
    with pytest.raises(ConflictError, match="2 runs are queued"):
        submit(studio)
    with pytest.raises(ConflictError, match="2 runs are queued"):
        runs.resume(studio, first)
    assert runs.get(studio, first).state == RunState.STOPPED


def test_a_release_and_the_end_of_a_pause_ring_the_bell(studio: Studio) -> None:
    number = submit(studio)
    queue.hold(studio, number)
    queue.pause(studio, True)
    rung = cast(FakeDispatch, studio.dispatch).rung
    rung.clear()
    queue.release(studio, number)
    queue.pause(studio, False)
    assert rung == [Bell.TRAIN, Bell.TRAIN]


# ---- why --------------------------------------------------------------------------------------


def test_each_run_says_why_it_waits(studio: Studio) -> None:
    add_worker(studio, "w")
    works, waits, held, later, ready, behind = (submit(studio) for _ in range(6))
    start(studio, works)
    queue.wait_for(studio, waits, works)
    queue.hold(studio, held)
    queue.start_after(studio, later, time.time() + 3600)
    found = why(studio)
    assert found[waits] == f"waits for run {works} (running)"
    assert found[held] == "paused by you"
    assert found[later].startswith("starts at ")
    assert found[ready] == "Next: starts as soon as a worker is free"
    assert found[behind] == f"its turn comes after run {ready}"
    queue.pause(studio, True)
    assert why(studio)[ready] == "the queue is paused"


@pytest.mark.parametrize(
    ("state", "words"),
    [(RunState.FAILED, "which failed"), (RunState.STOPPED, "which was stopped")],
)
def test_a_run_that_waits_in_vain_says_what_to_do(
    studio: Studio, state: RunState, words: str
) -> None:
    one, two = submit(studio), submit(studio)
    queue.wait_for(studio, two, one)
    end(studio, one, state)
    assert why(studio)[two] == (
        f"waits for run {one}, {words}: choose Start without it, or stop this run"
    )


def test_one_that_has_finished_keeps_nobody(studio: Studio) -> None:
    add_worker(studio, "w")
    one, two = submit(studio), submit(studio)
    queue.wait_for(studio, two, one)
    end(studio, one, RunState.FINISHED)
    assert why(studio)[two] == waiting.NEXT


def test_without_a_worker_nothing_starts(studio: Studio) -> None:
    number = submit(studio)
    assert waiting.why(studio, number) == "no worker is alive"
    start(studio, number)
    assert waiting.why(studio, number) == ""


def test_cards_are_given_in_order_and_a_large_run_keeps_its_place(studio: Studio) -> None:
    add_worker(studio, "w", *(card(number, 40) for number in range(4)))
    three, two, one = on_gpus(studio, 3), on_gpus(studio, 2, 30), on_gpus(studio, 1)
    too_large, on_cpu = on_gpus(studio, 5), submit(studio)
    assert why(studio) == {
        three: waiting.NEXT,
        two: "it needs 2 GPUs with 30 GiB each, and 1 of 4 is free",
        one: f"its turn comes after run {two}",
        too_large: "it needs 5 GPUs, and no worker has them",
        on_cpu: waiting.NEXT,
    }


def test_what_runs_holds_its_cards_and_workers_say_what_they_do(studio: Studio) -> None:
    add_worker(studio, "w", card(0), card(1))
    first, second = on_gpus(studio, 2), on_gpus(studio, 1)
    start(studio, first)
    with studio.database.write() as session:
        session.get_one(RunRow, first).gpus = [0, 1]
    found = waiting.overview(studio)
    assert [one.why for one in found.waiting] == ["it needs 1 GPU, and 0 of 2 are free"]
    assert [machine.works for machine in found.machines] == [(f"trains run {first}",)]
    assert found.waiting[0].row.id == second


def test_the_memory_of_a_run_on_gpus_is_known_before_it_starts(studio: Studio) -> None:
    on_gpu = runs.submit(studio, example_spec(studio, train={"num_gpus": 1}))
    assert on_gpu.needs_gib is not None
    assert 0 < on_gpu.needs_gib < 8
    assert runs.submit(studio, example_spec(studio)).needs_gib is None
