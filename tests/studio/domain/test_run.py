"""Run states: every life ends, and an end is left by the queue alone."""

import pytest

from studio.domain.run import LIVE, MOVES, RunState, sources

ENDS = {RunState.STOPPED, RunState.FINISHED, RunState.FAILED}


def reachable(start: RunState, shut: frozenset[RunState] = frozenset()) -> set[RunState]:
    found: set[RunState] = set()
    waiting = {start}
    while waiting:
        state = waiting.pop()
        found.add(state)
        waiting |= MOVES[state] - found - shut
    return found


def reachable_without_the_queue(start: RunState) -> set[RunState]:
    return reachable(start, frozenset({RunState.QUEUED}))


def test_every_state_can_be_reached_from_the_queue() -> None:
    assert reachable(RunState.QUEUED) == set(RunState)


@pytest.mark.parametrize("state", RunState)
def test_every_state_is_final_or_leads_to_an_end_and_never_to_itself(state: RunState) -> None:
    assert state.is_final == (state in ENDS)
    assert reachable(state) & ENDS
    assert state not in MOVES[state]


def test_a_state_comes_back_only_by_way_of_the_queue() -> None:
    assert sources(RunState.QUEUED) == LIVE | {RunState.STOPPED, RunState.FAILED}
    assert not MOVES[RunState.FINISHED]
    for state in set(RunState) - ENDS:
        for following in MOVES[state] - {RunState.QUEUED}:
            assert state not in reachable_without_the_queue(following)


@pytest.mark.parametrize("target", RunState)
def test_sources_are_the_moves_seen_from_their_target(target: RunState) -> None:
    assert sources(target) == {state for state in RunState if target in MOVES[state]}


def test_only_a_state_that_a_worker_holds_can_fail_or_finish() -> None:
    assert sources(RunState.FAILED) == sources(RunState.FINISHED) == LIVE
    assert all(state.is_live == (state in LIVE) for state in RunState)
    assert not any(state.is_final for state in LIVE)


def test_a_queued_run_stops_at_once_and_a_running_one_by_way_of_stopping() -> None:
    assert sources(RunState.STOPPED) == {RunState.QUEUED, RunState.STOPPING}
    assert sources(RunState.STOPPING) == {RunState.RUNNING}
