"""Verbs about the worker: see that one lives."""

import subprocess
import sys
import threading
import time
from importlib.metadata import version
from io import TextIOWrapper

from studio.disk import Home
from studio.errors import MachineError
from studio.locks import is_closing, is_locked, take_lock
from studio.services.studio import Studio
from studio.store import workers as store
from studio.store.clock import boot_id

START_SECONDS = 30.0


def need_worker(studio: Studio) -> TextIOWrapper:
    """Say that this process needs a worker, and start an embedded one when none lives.

    The embedded worker is a process of its own in its own session: it outlives this one as long as
    it has work, and ends by itself afterwards. Where workers are started by themselves, none is
    started here.

    Returns:
        An open file; the worker may end when it is closed.

    Raises:
        MachineError: The worker does not start, or one of another version lives.
    """
    refuse_other_version(studio)
    client = take_lock(studio.home.client_lock, shared=True)
    while client is None:  # a worker looks at this very moment whether anyone needs it
        time.sleep(0.02)
        client = take_lock(studio.home.client_lock, shared=True)
    if studio.settings.starts_worker:
        ensure_worker(studio.home)
    return client


def refuse_other_version(studio: Studio) -> None:
    """See that page and workers understand each other: rows and files may differ with the version.

    Raises:
        MachineError: A worker of another version lives.
    """
    mine = version("delta-studio")
    with studio.database.read() as session:
        alive = store.alive(session)
    for row in alive:
        lock = studio.home.worker(row.name)
        is_dead = row.boot_id == boot_id() and lock.exists() and not is_locked(lock)
        if row.version != mine and not (is_dead or row.is_closing):
            raise MachineError(
                f"A worker on {row.host} is of version {row.version}, and this is version {mine}.",
                f"End it there with `kill {row.pid}`: its runs save a checkpoint and go on from it "
                "with the other version.",
            )


def is_alive(home: Home) -> bool:
    """Tell whether a worker of this machine serves a home folder."""
    return any(is_locked(path) for path in (home.worker_lock, *home.workers.glob("*.lock")))


def takes_work(home: Home) -> bool:
    """Tell whether a worker of this machine serves a home folder and is not about to end."""
    return any(
        is_locked(path) and not is_closing(path)
        for path in (home.worker_lock, *home.workers.glob("*.lock"))
    )


def ensure_worker(home: Home) -> None:
    """Start an embedded worker unless one lives; one that is about to end is waited for.

    Raises:
        MachineError: It ended at once, or an old one does not end.
    """
    deadline = time.monotonic() + START_SECONDS
    while is_locked(home.worker_lock) and is_closing(home.worker_lock):
        if time.monotonic() > deadline:
            raise MachineError(
                "The old worker does not end.", f"Its log {home.worker_log} says what it does."
            )
        time.sleep(0.05)
    if takes_work(home):
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
    while not is_locked(home.worker_lock) and time.monotonic() < deadline:
        if process.poll() is not None:
            raise MachineError(
                f"The worker did not start (code {process.returncode}).",
                f"Its log {home.worker_log} says why.",
            )
        time.sleep(0.05)
