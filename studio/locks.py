"""Locks that the kernel takes back when their holder dies, however it dies."""

import fcntl
from io import TextIOWrapper
from pathlib import Path

from studio.disk import Home


def worker_note(pid: int, *, is_closing: bool) -> str:
    """Return what a worker writes into its lock file: its number, and whether it takes work."""
    return f"{pid}\n{'closing' if is_closing else 'open'}\n"


def worker_is_closing(home: Home) -> bool:
    """Tell whether the worker of a home folder takes no more work and is about to end."""
    return home.worker_lock.exists() and "closing" in home.worker_lock.read_text(encoding="utf-8")


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


def is_locked(path: Path) -> bool:
    """Tell whether any process holds a lock on a file."""
    lock = take_lock(path)
    if lock is None:
        return True
    lock.close()
    return False
