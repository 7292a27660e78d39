"""A Celery worker that only writes down which bells it hears: `python -m tests.listener HOME`.

It has the settings of a real worker and none of its work. With LATE it acknowledges a message
when its task has ended, and the task ends when the file HOME/hold is gone.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery

from studio.disk import Home
from studio.dispatch import celery_settings
from studio.settings import Settings

PATIENCE_SECONDS = 60.0


def main(folder: Path, *, is_late: bool) -> None:
    """Listen until the process is ended."""
    app = Celery("listener")
    app.conf.update(celery_settings(Home(path=folder), Settings()))
    app.conf.task_acks_late = is_late

    def hear(task: Any) -> None:
        _write(folder, f"began {task.request.id} {os.getpid()}\n")
        while is_late and (folder / "hold").exists():
            time.sleep(0.01)
        _write(folder, f"ended {task.request.id} {os.getpid()}\n")

    for name in ("train", "merge", "serve"):
        app.task(hear, bind=True, name=f"workers.tasks.{name}")
    options = "--pool=threads --loglevel=INFO --without-gossip --without-mingle --without-heartbeat"
    app.worker_main(["worker", f"--concurrency={1 if is_late else 8}", *options.split()])


def _write(folder: Path, line: str) -> None:
    """Add a line: several processes do so, each line in one write."""
    with (folder / "heard.txt").open("ab", buffering=0) as file:
        file.write(line.encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class Listener:
    """One listening process."""

    home: Home
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        """What the worker has logged."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")


def heard(home: Home, what: str = "ended") -> list[tuple[str, int]]:
    """Return the ids of the messages that began or ended, and in which process, in order."""
    path = home.path / "heard.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    words = [line.split() for line in lines]
    return [(name, int(pid)) for kind, name, pid in words if kind == what]


@contextmanager
def listening(home: Home, *, broker_url: str = "", is_late: bool = False) -> Iterator[Listener]:
    """Run a listener while the block runs; it need not have connected yet."""
    log_path = home.path / f"listener-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "tests.listener", str(home.path), "late" if is_late else ""]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parent.parent,
            env={"PATH": os.defpath, "HOME": str(home.path), "STUDIO_BROKER_URL": broker_url},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Listener(home=home, process=process, log_path=log_path)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until something is so; after a minute the test fails."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {PATIENCE_SECONDS} seconds"
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), is_late=sys.argv[2] == "late")
