"""Verbs about the worker: see that one lives."""

import subprocess
import sys
import threading
import time
from io import TextIOWrapper

from studio.disk import Home, is_locked, take_lock, worker_is_closing
from studio.errors import MachineError
from studio.services.studio import Studio

START_SECONDS = 30.0


def need_worker(studio: Studio) -> TextIOWrapper:
    """Say that this process needs a worker, and start an embedded one when none lives.

    The worker is a process of its own in its own session: it outlives this one as long as it has
    work, and ends by itself afterwards.

    Returns:
        An open file; the worker may end when it is closed.

    Raises:
        MachineError: The worker does not start.
    """
    client = take_lock(studio.home.client_lock, shared=True)
    while client is None:  # a worker looks at this very moment whether anyone needs it
        time.sleep(0.02)
        client = take_lock(studio.home.client_lock, shared=True)
    ensure_worker(studio.home)
    return client


def is_alive(home: Home) -> bool:
    """Tell whether a worker serves a home folder."""
    return is_locked(home.worker_lock)


def ensure_worker(home: Home) -> None:
    """Start an embedded worker unless one lives; one that is about to end is waited for.

    Raises:
        MachineError: It ended at once, or an old one does not end.
    """
    deadline = time.monotonic() + START_SECONDS
    while is_alive(home) and worker_is_closing(home):
        if time.monotonic() > deadline:
            raise MachineError(
                "The old worker does not end.", f"Its log {home.worker_log} says what it does."
            )
        time.sleep(0.05)
    if is_alive(home):
        return
    with home.worker_log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers", "--home", str(home.path), "--embedded"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # Whoever starts a process takes note of its end, or it stays in the system's list.
    threading.Thread(target=process.wait, daemon=True).start()
    while not is_alive(home) and time.monotonic() < deadline:
        if process.poll() is not None:
            raise MachineError(
                f"The worker did not start (code {process.returncode}).",
                f"Its log {home.worker_log} says why.",
            )
        time.sleep(0.05)
