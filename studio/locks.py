"""Locks that the kernel takes back when their holder dies, however it dies."""

import fcntl
import time
from io import TextIOWrapper
from pathlib import Path

# Whoever only looks holds a lock for a moment.
_TRIES, _LOOK_SECONDS = 5, 0.01


def worker_note(pid: int, *, is_closing: bool) -> str:
    """Return what a worker writes into its lock file: its number, and whether it takes work."""
    return f"{pid}\n{'closing' if is_closing else 'open'}\n"


def is_closing(worker_lock: Path) -> bool:
    """Tell whether the worker that holds a lock file takes no more work and is about to end."""
    return worker_lock.exists() and "closing" in worker_lock.read_text(encoding="utf-8")


def take_lock(path: Path, *, shared: bool = False) -> TextIOWrapper | None:
    """Lock a file until the returned object is closed or this process ends, however it ends.

    Args:
        path: The lock file; created when missing.
        shared: Whether others may hold it too, shared.

    Returns:
        The open file, which holds the lock; None when another process is in the way.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def take_lock_soon(path: Path) -> TextIOWrapper | None:
    """Lock a file, although somebody may just be looking whether it is locked.

    Returns:
        As of `take_lock`.
    """
    for _ in range(_TRIES):
        lock = take_lock(path)
        if lock is not None:
            return lock
        time.sleep(_LOOK_SECONDS)
    return None


def is_locked(path: Path) -> bool:
    """Tell whether any process holds a lock on a file."""
    lock = take_lock(path)
    if lock is None:
        return True
    lock.close()
    return False
