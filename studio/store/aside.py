"""Keep what is replaced: it is moved into `aside/`, never deleted."""

import time
from collections.abc import Iterable
from pathlib import Path

from studio.disk import Home


def files_of(database: Path) -> list[Path]:
    """Return the files of a SQLite database that are there: its own, its log, its index."""
    names = [database.with_name(database.name + end) for end in ("", "-wal", "-shm", "-journal")]
    return [path for path in names if path.exists()]


def folders_of_work(home: Home) -> list[Path]:
    """Return the folders of runs, merges and chats that are there."""
    return [
        path
        for parent in (home.runs, home.merges, home.chats)
        for path in sorted(parent.glob("*"))
        if path.is_dir()
    ]


def set_aside(home: Home, paths: Iterable[Path]) -> Path | None:
    """Move files and folders of a home folder away, in the layout that they have there.

    Returns:
        The new folder under `aside/`; None where there was nothing to move.
    """
    there = [path for path in paths if path.exists()]
    if not there:
        return None
    folder = _fresh(home.path / "aside")
    for path in there:
        place = folder / path.relative_to(home.path)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.rename(place)
    return folder


def _fresh(parent: Path) -> Path:
    parent.mkdir(mode=0o700, exist_ok=True)
    name, number = time.strftime("%Y%m%d-%H%M%S", time.gmtime()), 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            return folder
