"""A disk of a few MiB that a test may fill."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 2**20


@contextmanager
def small_disk(folder: Path, size_mib: int) -> Iterator[Path]:
    """Mount a disk of a few MiB.

    Tests that need one are skipped where nobody may mount.
    """
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use all of a disk that is left; return the file that does."""
    stuffing = folder / "stuffing"
    with stuffing.open("wb", buffering=0) as file:
        size = MIB
        while size:
            try:
                file.write(b"x" * size)
            except OSError:
                size //= 2
    return stuffing
