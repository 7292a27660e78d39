"""The files of a Checkpoint: written beside its name, believed only when whole, removed when old."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from studio.errors import EngineError, MachineError, disk_errors
from workers.fence import Fence

log = logging.getLogger(__name__)

VERSION = 2
MANIFEST = "manifest.json"
TENSORS = "tensors"
STATE = "state.json"
_PREFIX, _OLDER = "step-", ".old"
_READ_BYTES = 1 << 22
_MIB = 1 << 20
_NO_SPACE = os.strerror(errno.ENOSPC)


def rng_name(rank: int) -> str:
    """Return the name of the file that holds the random numbers of a rank."""
    return f"rng-{rank:05d}.safetensors"


def make_room(temporary: Path, num_bytes: int) -> None:
    """Make the empty folder that a Checkpoint is written into.

    Args:
        temporary: The folder.
        num_bytes: What it will hold, about.

    Raises:
        MachineError: The disk is read-only, or has not the room; nothing was written then.
    """
    with disk_errors("saving a Checkpoint"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if shutil.disk_usage(temporary).free < num_bytes:
            raise give_up(temporary, OSError(errno.ENOSPC, "no room"), num_bytes)


def give_up(temporary: Path, met: Exception, num_bytes: int) -> Exception:
    """Remove a Checkpoint that could not be written, and return what to raise.

    Args:
        temporary: What there is of it.
        met: What a rank met.
        num_bytes: What it would have held, about.

    Returns:
        On a full disk a sentence with the room that is needed and that there is, else `met`.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    number = met.errno if isinstance(met, OSError) else None
    # safetensors and torch say it in words alone.
    if number not in (errno.ENOSPC, errno.EDQUOT) and _NO_SPACE not in str(met):
        return met
    free = shutil.disk_usage(temporary.parent).free
    return MachineError(
        f"The disk is full: a Checkpoint needs about {num_bytes / _MIB:,.1f} MiB, and "
        f"{free / _MIB:,.1f} MiB are free. The Checkpoints before it are as they were.",
        "Free some space, then resume the run: it goes on from the latest of them.",
    )


def publish(temporary: Path, folder: Path, state: Mapping[str, Any], fence: Fence) -> None:
    """Write state and manifest, bring all to the disk, and give the folder its name.

    Args:
        temporary: Holds the tensors and one file of random numbers for each of `state["ranks"]`.
        folder: What it shall be called; an older one of that name stays until this is whole.
        state: What else is kept, as JSON.
        fence: Asked last.

    Raises:
        FencedError: The run belongs to another worker by now.
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
        try:
            _write_manifest(temporary, state)
        except OSError as error:
            raise give_up(temporary, error, _bytes_of(temporary)) from error
        if fence.is_lost():
            shutil.rmtree(temporary, ignore_errors=True)
            fence.refuse()
        older = folder.parent / f".{folder.name}{_OLDER}"
        shutil.rmtree(older, ignore_errors=True)
        if folder.exists():
            folder.rename(older)
        temporary.rename(folder)
        flush(folder.parent)
        shutil.rmtree(older, ignore_errors=True)


def _write_manifest(temporary: Path, state: Mapping[str, Any]) -> None:
    """Write what a Checkpoint is believed by, and bring all of it to the disk."""
    _write_json(temporary / STATE, {"version": VERSION, **state})
    files = {
        str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(temporary)
    }
    _write_json(temporary / MANIFEST, {"version": VERSION, "files": files})
    for inner in (temporary / TENSORS, temporary):
        flush(inner)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


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


def put_back(checkpoints: Path) -> None:
    """Give those Checkpoints their names back that were being replaced when a save was cut off."""
    for older in checkpoints.glob(f".{_PREFIX}*{_OLDER}"):
        folder = checkpoints / older.name.removeprefix(".").removesuffix(_OLDER)
        if not folder.exists():
            older.rename(folder)


def latest_good(checkpoints: Path, say: Callable[[int, str], None] | None = None) -> Path | None:
    """Return the newest undamaged Checkpoint of a folder; damaged ones are named in the log.

    Args:
        checkpoints: Folder of Checkpoints.
        say: Told of each damaged one: its step, and what is wrong with it.
    """
    for folder in reversed(_steps(checkpoints)):
        damage = damage_of(folder)
        if not damage:
            return folder
        log.warning("Checkpoint %s is left out: %s.", folder, damage)
        if say is not None:
            say(_step_of(folder), damage)
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
    for folder in remains:
        shutil.rmtree(folder, ignore_errors=True)
    gone = [folder for folder in _steps(checkpoints) if folder not in stay]
    for folder in gone:
        # Without its name first: half of one shall not look like a Checkpoint.
        nameless = checkpoints / f".{folder.name}.gone"
        folder.rename(nameless)
        shutil.rmtree(nameless, ignore_errors=True)
    return gone + remains


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
