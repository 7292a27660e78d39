"""Folders that appear whole or not at all, and files that only one process holds."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder beside its name and rename it when the block ends well.

    Args:
        folder: Where it shall stand; one that stands there already is replaced.

    Yields:
        An empty folder to write into. A block that fails leaves nothing of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process or thread holds a lock on a file, and hold it for the block.

    Args:
        path: The lock file; created when missing. The kernel frees it however a process ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
