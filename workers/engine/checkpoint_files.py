"""The files of a Checkpoint: written beside its name, believed only when whole, removed when old."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studio.errors import EngineError, disk_errors

log = logging.getLogger(__name__)

VERSION = 2
MANIFEST = "manifest.json"
TENSORS = "tensors"
STATE = "state.json"
_PREFIX = "step-"
_READ_BYTES = 1 << 22


def rng_name(rank: int) -> str:
    """Return the name of the file that holds the random numbers of a rank."""
    return f"rng-{rank:05d}.safetensors"


def make_room(temporary: Path) -> None:
    """Make the empty folder that a Checkpoint is written into.

    Raises:
        MachineError: The disk is full or read-only.
    """
    with disk_errors("saving a Checkpoint"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)


def publish(temporary: Path, folder: Path, state: Mapping[str, Any]) -> None:
    """Write state and manifest, bring all to the disk, and give the folder its name.

    Args:
        temporary: Holds the tensors and one file of random numbers for each of `state["ranks"]`.
        folder: What it shall be called; an older one of that name stays until this is whole.
        state: What else is kept, as JSON.

    Raises:
        MachineError: The disk is full or read-only.
        EngineError: Ranks wrote to another disk than this one.
    """
    missing = [rank for rank in range(state["ranks"]) if not (temporary / rng_name(rank)).is_file()]
    if missing:
        raise EngineError(
            f"The part of rank {missing[0]} and {len(missing) - 1} others did not arrive in "
            f"{temporary.parent}.",
            "Give all machines the same home folder, on a disk that they share.",
        )
    with disk_errors(f"saving {folder.name}"):
        _write_json(temporary / STATE, {"version": VERSION, **state})
        files = {
            str(path.relative_to(temporary)): {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
            for path in _files(temporary)
        }
        _write_json(temporary / MANIFEST, {"version": VERSION, "files": files})
        for inner in (temporary / TENSORS, temporary):
            flush(inner)
        older = folder.parent / f".{folder.name}.old"
        shutil.rmtree(older, ignore_errors=True)
        if folder.exists():
            folder.rename(older)
        temporary.rename(folder)
        flush(folder.parent)
        shutil.rmtree(older, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Check a Checkpoint and read its state.json.

    Raises:
        EngineError: It is damaged, or of another version of the studio.
    """
    hint = "Choose an earlier Checkpoint, or start the run anew."
    if damage := damage_of(folder):
        raise EngineError(f"The Checkpoint in {folder} is damaged: {damage}.", hint)
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["version"] != VERSION:
        raise EngineError(
            f"The Checkpoint in {folder} has format {state['version']}, this studio reads "
            f"{VERSION}.",
            "Start the run anew.",
        )
    return state


def damage_of(folder: Path, *, by_size: bool = False) -> str:
    """Return what is wrong with a Checkpoint's files, as in "rng-00000.safetensors is missing".

    Args:
        folder: A Checkpoint.
        by_size: Look at the sizes of files alone, which reads none of them.

    Returns:
        Empty when the folder holds the files that the manifest names, each of that size and
        sha256, and no others.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        there = {str(path.relative_to(folder)) for path in _files(folder)} - {MANIFEST}
        for name in sorted(there ^ files.keys()):
            return f"{name} is {'not in its manifest' if name in there else 'missing'}"
        for name, stored in files.items():
            num_bytes = (folder / name).stat().st_size
            if num_bytes != stored["bytes"]:
                return f"{name} has {num_bytes} of {stored['bytes']} bytes"
            if not by_size and _sha256(folder / name) != stored["sha256"]:
                return f"{name} was changed"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return ""


def latest_good(checkpoints: Path) -> Path | None:
    """Return the newest undamaged Checkpoint of a folder; damaged ones are named in the log."""
    for folder in reversed(_steps(checkpoints)):
        damage = damage_of(folder)
        if not damage:
            return folder
        log.warning("Checkpoint %s is left out: %s.", folder, damage)
    return None


def prune(checkpoints: Path, keep: int, best: int | None = None) -> list[Path]:
    """Remove old Checkpoints and what saves that were cut off have left.

    One whose files do not have the sizes that its manifest names is none. Rank 0 alone calls it.

    Args:
        checkpoints: Folder of Checkpoints.
        keep: How many of the newest stay, at least 1.
        best: Step of one that stays as well.

    Returns:
        The folders that were removed.
    """
    whole = [folder for folder in _steps(checkpoints) if not damage_of(folder, by_size=True)]
    stay = set(whole[-max(1, keep) :])
    stay |= {folder for folder in whole if best is not None and _step_of(folder) == best}
    remains = sorted(checkpoints.glob(f".{_PREFIX}*"))
    gone = [folder for folder in _steps(checkpoints) if folder not in stay] + remains
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    return gone


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _steps(checkpoints: Path) -> list[Path]:
    """Return the folders of Checkpoints, oldest first."""
    found = [p for p in checkpoints.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=_step_of)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
