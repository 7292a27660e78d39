"""Moments as people write and read them, on this machine's clock."""

import re
import time
from datetime import datetime, timedelta

from studio.errors import InputError

_UNITS = {"m": "minutes", "min": "minutes", "h": "hours", "d": "days"}
_LATER = re.compile(r"\+\s*(\d{1,6})\s*(m|min|h|d)")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})")
HINT = "Write 22:00, 2031-05-17 22:00, or +90m, +8h, +2d from now."


def parse_moment(text: str, field: str = "start_after") -> float:
    """Return the moment that somebody wrote, in seconds since 1970.

    Args:
        text: A time of day, which is the next such time; a date with a time; or a span from now.
        field: What is at fault when it is none of these.

    Raises:
        InputError: It is no moment, or it is in the past.
    """
    said, now = text.strip().lower(), datetime.now().astimezone()
    try:
        found = _parse(said, now)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{text.strip()[:80]!r} is no time.", HINT, field=field) from error
    return check_moment(found.timestamp(), field)


def _parse(said: str, now: datetime) -> datetime:
    if later := _LATER.fullmatch(said):
        return now + timedelta(**{_UNITS[later[2]]: int(later[1])})
    if clock := _CLOCK.fullmatch(said):
        there = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        return there if there > now else there + timedelta(days=1)
    return datetime.fromisoformat(said).astimezone()


def check_moment(moment: float, field: str = "start_after") -> float:
    """Return a moment that is still to come.

    Raises:
        InputError: It is in the past.
    """
    if not moment > time.time():
        raise InputError(f"{moment_words(moment)} is in the past.", HINT, field=field)
    return moment


def moment_words(moment: float) -> str:
    """Return a moment as it is read: `14:03` today, else `22 Nov 14:03`."""
    there, now = time.localtime(moment), time.localtime()
    if there[:3] == now[:3]:
        return time.strftime("%H:%M", there)
    return time.strftime("%d %b %H:%M" if there[0] == now[0] else "%d %b %Y %H:%M", there)
