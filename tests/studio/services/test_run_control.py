"""Pause, resume, save now, evaluate now: what may be asked of a Run, and when."""

import pytest

from studio.domain.run import RunState, Wish
from studio.errors import ConflictError, NotFoundError
from studio.services import runs
from studio.services.studio import Studio
from tests.studio.queued import end, start, submit


def kinds(studio: Studio, run_id: int) -> list[str]:
    return [event.kind for event in runs.history(studio, run_id)]


def test_a_queued_run_that_is_paused_is_held_and_resume_lets_it_go(studio: Studio) -> None:
    number = submit(studio)
    held = runs.pause(studio, number)
    assert (held.state, held.is_held) == (RunState.QUEUED, True)
    with pytest.raises(ConflictError, match="paused already"):
        runs.pause(studio, number)
    assert not runs.resume(studio, number).is_held
    assert kinds(studio, number) == ["queued", "paused", "resumed"]


def test_a_running_run_that_is_paused_stops_with_that_wish_and_may_be_asked_twice(
    studio: Studio,
) -> None:
    number = submit(studio)
    start(studio, number)
    for _ in range(2):
        row = runs.pause(studio, number)
        assert (row.state, row.wish) == (RunState.STOPPING, Wish.PAUSE)


def test_a_stop_takes_the_place_of_a_pause_but_not_the_other_way(studio: Studio) -> None:
    number = submit(studio)
    start(studio, number)
    runs.pause(studio, number)
    assert runs.stop(studio, number).wish == Wish.STOP
    with pytest.raises(ConflictError, match="is STOPPING"):
        runs.pause(studio, number)


def test_what_is_over_cannot_be_paused(studio: Studio) -> None:
    number = submit(studio)
    end(studio, number, RunState.FINISHED)
    with pytest.raises(ConflictError, match="is FINISHED"):
        runs.pause(studio, number)
    with pytest.raises(NotFoundError, match="no run 99"):
        runs.pause(studio, 99)


def test_a_paused_run_that_was_stopped_is_no_longer_held_when_it_is_resumed(
    studio: Studio,
) -> None:
    number = submit(studio)
    runs.pause(studio, number)
    runs.stop(studio, number)
    row = runs.resume(studio, number)
    assert (row.state, row.is_held) == (RunState.QUEUED, False)


def test_wishes_are_counted_while_a_run_works_and_refused_otherwise(studio: Studio) -> None:
    number = submit(studio, data={"eval_share": 0.1})
    for verb in (runs.save_now, runs.evaluate_now):
        with pytest.raises(ConflictError, match="is QUEUED"):
            verb(studio, number)
    start(studio, number)
    runs.save_now(studio, number)
    assert runs.save_now(studio, number).saves_asked == 2
    assert runs.evaluate_now(studio, number).evaluations_asked == 1
    with pytest.raises(NotFoundError, match="no run 99"):
        runs.save_now(studio, 99)


def test_a_run_without_anything_to_measure_is_not_evaluated(studio: Studio) -> None:
    number = submit(studio, data={"eval_share": 0.0, "eval_dataset": ""}, eval={"prompts": []})
    start(studio, number)
    with pytest.raises(ConflictError, match="nothing to evaluate on"):
        runs.evaluate_now(studio, number)
