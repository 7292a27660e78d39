"""Moments as people write them."""

import time
from datetime import datetime, timedelta

import pytest

from studio.domain.moment import moment_words, parse_moment
from studio.errors import InputError


@pytest.mark.parametrize(("text", "seconds"), [("+90m", 5400), ("+ 8h", 28800), ("+2d", 172800)])
def test_a_span_counts_from_now(text: str, seconds: int) -> None:
    assert parse_moment(text) == pytest.approx(time.time() + seconds, abs=5)


def test_a_time_of_day_is_the_next_one() -> None:
    for hours in (1, -1):
        clock = (datetime.now() + timedelta(hours=hours)).strftime("%H:%M")
        moment = parse_moment(clock)
        assert 0 < moment - time.time() <= 86_400
        assert moment_words(moment).endswith(clock)


def test_a_date_is_a_date() -> None:
    assert datetime.fromtimestamp(parse_moment("2131-05-17 22:00")) == datetime(2131, 5, 17, 22)


@pytest.mark.parametrize(
    "text", ["", "soon", "25:00", "+0m", "2001-01-01 10:00", "+99999999d", "9999-99-99", "12"]
)
def test_what_is_no_moment_to_come_is_refused_in_words(text: str) -> None:
    with pytest.raises(InputError, match=r"no time|in the past"):
        parse_moment(text)


def test_words_name_the_day_when_it_is_not_today() -> None:
    assert moment_words(time.time()) == time.strftime("%H:%M")
    assert moment_words(86_400.0).startswith("02 Jan 1970")
