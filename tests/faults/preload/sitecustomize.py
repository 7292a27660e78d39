"""Faults of a machine, in every Python process that has this folder in its PYTHONPATH.

FAULTY_CLOCK names a file: a number of seconds by which the wall clock is wrong.
SLOW_DISK is how many seconds an fsync takes.
"""

import os
import time
from pathlib import Path
from typing import Any

_real_time, _real_fsync = time.time, os.fsync


def _wrong_time() -> float:
    try:
        return _real_time() + float(Path(os.getenv("FAULTY_CLOCK", "")).read_text())
    except (OSError, ValueError):
        return _real_time()


def _slow_fsync(file: Any) -> None:
    time.sleep(float(os.getenv("SLOW_DISK", "0")))
    _real_fsync(file)


if os.getenv("FAULTY_CLOCK"):
    time.time = _wrong_time
if os.getenv("SLOW_DISK"):
    os.fsync = _slow_fsync  # type: ignore[assignment]
