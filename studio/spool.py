"""A folder of messages between processes of one machine: no server, and nothing lost by a kill.

    queue/     messages that wait; their names begin with the time, so that they sort by age
    inflight/  messages being worked on, as <owner>@<name>
    owners/    one file for each owner, locked as long as its process lives
    dead/      the newest of those that nobody can read

Whoever takes a message moves it to inflight/ under the name of an owner whose lock proves that
it lives. When the kernel has taken that lock back, everyone may move the message to queue/ again.
Folders that somebody removes are made again.
"""

import os
import shutil
import stat
import time
import uuid
from io import TextIOWrapper
from pathlib import Path

from studio.disk import write_whole
from studio.locks import take_lock

MAX_DEAD = 100
MAX_MESSAGE_BYTES = 2**20  # a bell has fewer than 2,000
_LONGEST_NAME = 200  # with an owner or a time before it still a name of a file


class Spool:
    """The folder, as one process sees it. What it has taken is given back when it dies."""

    def __init__(self, folder: Path) -> None:
        self._queue = folder / "queue"
        self._inflight = folder / "inflight"
        self._owners = folder / "owners"
        self._dead = folder / "dead"
        self._folders = (folder, self._queue, self._inflight, self._owners, self._dead)
        self._lock: TextIOWrapper | None = None

    def create(self) -> None:
        """Create the folders, readable by their owner only; what lies above them must exist.

        Raises:
            OSError: The disk is full, read-only or gone.
        """
        for folder in self._folders:
            folder.mkdir(mode=0o700, exist_ok=True)

    def put(self, queue: str, text: str) -> None:
        """Add a message, whole or not at all.

        Raises:
            OSError: As in `create`.
            MachineError: The disk is full or read-only.
        """
        self.create()
        write_whole(self._queue / f"{time.time_ns():020d}_{uuid.uuid4()}.{queue}.msg", text)

    def waiting(self, queue: str) -> list[str]:
        """Return the names of a queue's messages, oldest first.

        Raises:
            OSError: As in `create`.
        """
        self.create()
        return [
            name
            for name in _names(self._queue)
            if name.partition(".")[2] == f"{queue}.msg" and len(name) <= _LONGEST_NAME
        ]

    def take(self, name: str) -> str | None:
        """Take a waiting message.

        Returns:
            Its name in flight; None when another one was faster.
        """
        taken = f"{self._owner()}@{name}"
        return taken if _move(self._queue / name, self._inflight / taken) else None

    def read(self, taken: str) -> bytes:
        """Return the content of a message in flight.

        Raises:
            ValueError: It is too large, or no file.
            OSError: It cannot be read, or is gone.
        """
        path = self._inflight / taken
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode) or state.st_size > MAX_MESSAGE_BYTES:
            raise ValueError(f"it is no file of at most {MAX_MESSAGE_BYTES} bytes")
        return path.read_bytes()

    def finish(self, taken: str) -> None:
        """Forget a message in flight: it was worked on."""
        (self._inflight / taken).unlink(missing_ok=True)

    def give_back(self, taken: str) -> None:
        """Let a message in flight wait again, at its old place.

        Raises:
            OSError: As in `create`.
        """
        self.create()
        _move(self._inflight / taken, self._queue / taken.partition("@")[2])

    def bury(self, taken: str) -> None:
        """Keep a message in flight that cannot be read, for whoever wants to know why.

        Raises:
            OSError: As in `create`.
        """
        self.create()
        name = taken.partition("@")[2]
        _move(self._inflight / taken, self._dead / f"{time.time_ns():020d}_{name}")
        for old in _names(self._dead)[:-MAX_DEAD]:
            _remove(self._dead / old)

    def restore(self) -> int:
        """Give back what owners that live no more had taken.

        Returns:
            The number of messages that wait again.

        Raises:
            OSError: As in `create`.
        """
        self.create()
        # In this order: the owner of a message that is listed here has its file since before.
        in_flight = _names(self._inflight)
        for name in _names(self._owners):
            lock = take_lock(self._owners / name)
            if lock is not None:  # nobody held it, so that its process is dead
                with lock:
                    (self._owners / name).unlink(missing_ok=True)
        alive = set(_names(self._owners))
        orphans = [taken for taken in in_flight if taken.partition("@")[0] not in alive]
        for taken in orphans:
            self.give_back(taken)
        return len(orphans)

    def close(self) -> None:
        """Stop being an owner; what is still in flight is everyone's."""
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _owner(self) -> str:
        """Return the name of this owner; a new one when somebody has removed its file."""
        if self._lock is not None and not _is_there(self._lock):
            self.close()
        while self._lock is None:
            self._lock = take_lock(self._owners / uuid.uuid4().hex)
        return Path(self._lock.name).name


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _is_there(file: TextIOWrapper) -> bool:
    """Tell whether an open file is still the one that its name leads to."""
    try:
        return os.path.samestat(Path(file.name).stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _move(source: Path, target: Path) -> bool:
    """Move a file; of several who try, one succeeds."""
    try:
        source.rename(target)
    except FileNotFoundError:
        return False
    return True


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a folder, which nobody of us has made
        shutil.rmtree(path, ignore_errors=True)
