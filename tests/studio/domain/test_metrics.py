"""Metrics: an honest range for the time left, and curves that keep their last point."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from studio.domain.metrics import Point, StepRecord, thin, time_left_seconds

SECONDS = st.lists(st.floats(0.001, 1000), min_size=3, max_size=50)


@given(SECONDS, st.integers(1, 1000), st.integers(0, 1000))
def test_the_time_left_is_a_range_within_the_fastest_and_slowest_step(
    seconds: list[float], step: int, more: int
) -> None:
    estimate = time_left_seconds(seconds, step, step + more)

    assert estimate is not None
    low, high = estimate
    assert more * min(seconds) <= low <= high <= more * max(seconds)


@given(st.floats(0.001, 1000), st.integers(3, 20), st.integers(0, 1000))
def test_steady_steps_give_an_exact_time(second: float, count: int, more: int) -> None:
    assert time_left_seconds([second] * count, 5, 5 + more) == (more * second, more * second)


def test_one_slow_step_does_not_stretch_the_range() -> None:
    assert time_left_seconds([1.0] * 9 + [600.0], 10, 20) == (10.0, 10.0)


@pytest.mark.parametrize("seconds", [[], [1.0], [1.0, 1.0]])
def test_too_few_steps_are_no_estimate(seconds: list[float]) -> None:
    assert time_left_seconds(seconds, 2, 100) is None


def test_a_run_beyond_its_plan_has_no_estimate() -> None:
    assert time_left_seconds([1.0, 1.0, 1.0], 11, 10) is None


@given(st.integers(0, 500), st.integers(1, 100))
def test_thinned_points_are_few_evenly_spaced_and_end_with_the_last(
    count: int, max_points: int
) -> None:
    points = [Point(step=step, name="loss", value=1 / (step + 1)) for step in range(count)]
    kept = thin(points, max_points)

    assert len(kept) <= max_points
    assert [point for point in points if point in kept] == kept
    assert kept[-1:] == points[-1:]
    assert len({b.step - a.step for a, b in pairwise(kept)}) <= 1
    if count <= max_points:
        assert kept == points


@given(
    st.integers(1, 10**6),
    st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
)
def test_a_step_record_survives_its_line_of_json(step: int, values: dict[str, float]) -> None:
    record = StepRecord(step=step, total_steps=step, values=values)

    assert StepRecord.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_never_a_measurement(value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        StepRecord(step=1, total_steps=1, values={"loss": value})
