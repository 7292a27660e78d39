"""What this machine has, and what is missing."""

import json
import shutil
import sqlite3
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from studio.doctor_store import Finding, examine_store
from studio.services.studio import Studio
from studio.services.workers import is_alive

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "gradio", "celery")
GPU_PACKAGES = ("flash-linear-attention", "liger-kernel")
# https://sqlite.org/wal.html#walresetbug: two writers at the same instant may damage the file.
FIXED_SQLITE = (3, 51, 3)
BACKPORTED_SQLITE = ((3, 50, 7), (3, 44, 6))
MIN_FREE_BYTES = 5 * 2**30


def examine(studio: Studio) -> list[Finding]:
    """Look at the machine; nothing is changed."""
    return [
        Finding(name="python", good=sys.version_info >= (3, 11), text=sys.version.split()[0]),
        *[_package(name, needed=True) for name in PACKAGES],
        *[_package(name, needed=False) for name in GPU_PACKAGES],
        _sqlite(),
        *examine_store(studio.database),
        _disk(studio),
        _gpus(),
        _worker(studio),
    ]


def _package(name: str, *, needed: bool) -> Finding:
    try:
        return Finding(name=name, good=True, text=version(name))
    except PackageNotFoundError:
        text = "missing; install it" if needed else "not installed (only used on a GPU)"
        return Finding(name=name, good=False if needed else None, text=text)


def _sqlite() -> Finding:
    fixed = is_fixed_sqlite(sqlite3.sqlite_version_info)
    text = sqlite3.sqlite_version
    if not fixed:
        text += ": before 3.51.3, which fixed a rare fault of the write-ahead log; keep backups"
    return Finding(name="sqlite", good=True if fixed else None, text=text)


def is_fixed_sqlite(version: tuple[int, int, int]) -> bool:
    """Tell whether a version of SQLite is without the fault of its write-ahead log."""
    return version >= FIXED_SQLITE or any(
        version[:2] == back[:2] and version >= back for back in BACKPORTED_SQLITE
    )


def _disk(studio: Studio) -> Finding:
    free = shutil.disk_usage(studio.home.path).free
    text = f"{free / 2**30:.1f} GiB free in {studio.home.path}"
    good = free > MIN_FREE_BYTES
    return Finding(name="disk", good=good, text=text if good else f"only {text}; free some space")


def _gpus() -> Finding:
    command = [sys.executable, "-m", "workers.gpus"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    cards = json.loads(answer.stdout) if answer.returncode == 0 else []
    if not cards:
        return Finding(name="gpus", good=None, text="none: the tiny presets train on the CPU")
    text = ", ".join(f"{card['name']} ({_memory(card['total_gib'])})" for card in cards)
    return Finding(name="gpus", good=True, text=text)


def _memory(total_gib: float | None) -> str:
    return "memory unknown" if total_gib is None else f"{total_gib:.0f} GiB"


def _worker(studio: Studio) -> Finding:
    alive = is_alive(studio.home)
    text = "one serves this home folder" if alive else "none; `studio up` starts one"
    return Finding(name="worker", good=True if alive else None, text=text)
