"""Weights in 4 bits on disk, so that the next start reads a quarter and quantises nothing.

One folder an entry: a checkpoint in transformers' own layout, one file a layer, and a manifest
with the checksum of each. An entry is named by what it was made of (base files, settings,
versions), appears whole, and is made anew when anything about it is not as it was written.
Not covered: sharing between machines; the bytes of a CPU and of a card are kept apart, since their
kernels may round differently.
"""

import json
import logging
import mmap
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from studio.disk import write_whole
from studio.errors import disk_errors
from studio.locks import take_lock
from studio.whole import whole_folder
from workers.engine.quantize import four_bit_tensors

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
# What transformers makes the settings of `generate` from, beside the weights.
_BESIDE = ("config.json", "generation_config.json")
_GIB = 2**30
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# They decide bytes and names in an entry.
_PACKAGES = ("bitsandbytes", "transformers")
_THREADS = 4
_CHUNK_BYTES = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedCache:
    """A folder of entries.

    Attributes:
        folder: Where they lie; created when the first is written.
        max_bytes: What all entries may take together; the longest unused go first.
        min_free_bytes: What stays free on the disk.
        min_base_bytes: Smaller bases are quantised faster than they are looked up.
    """

    folder: Path
    max_bytes: int = 400 * _GIB
    min_free_bytes: int = 20 * _GIB
    min_base_bytes: int = _GIB

    def entry(self, base: Path, settings: dict[str, Any]) -> Path | None:
        """Return where the entry of a base stands or would stand.

        Args:
            base: A Hugging Face folder.
            settings: All else that decides the bytes.

        Returns:
            None where the base is too small to be worth one.
        """
        files = sorted(base.glob("*.safetensors"))
        if sum(path.stat().st_size for path in files) < self.min_base_bytes:
            return None
        made_of = {
            "format": FORMAT,
            "packages": {name: version(name) for name in _PACKAGES},
            "settings": settings,
            "config": sha256((base / "config.json").read_bytes()).hexdigest(),
            "files": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        }
        digest = sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return self.folder / digest[:32]

    @contextmanager
    def reading(self, entry: Path) -> Iterator[bool]:
        """Keep an entry from being removed while it is read.

        Yields:
            Whether it is there, whole and undamaged.
        """
        lock = take_lock(_lock_of(entry), shared=True) if entry.is_dir() else None
        if lock is None:
            yield False
            return
        with lock:
            is_whole = _is_whole(entry)
            if is_whole:
                os.utime(entry / MANIFEST)
            yield is_whole

    def store(self, model: PreTrainedModel, base: Path, entry: Path) -> bool:
        """Write the weights of a model in 4 bits; older entries make way.

        Args:
            model: As it was loaded: no adapter, nothing moved.
            base: The folder that it was loaded from.
            entry: Where to, as `entry` gave it.

        Returns:
            Whether it was written: not where another process does it, or where room is lacking.

        Raises:
            MachineError: The disk cannot be written.
        """
        with disk_errors("storing the weights in 4 bits"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = take_lock(_lock_of(entry))
            if lock is None:
                return False
            with lock:
                files = _files_of(model)
                needed = sum(_size(tensors) for tensors in files.values())
                if not self._make_room(needed, entry):
                    return False
                with whole_folder(entry) as inner:
                    _write(files, inner)
                    for name in _BESIDE:
                        if (base / name).is_file():
                            shutil.copyfile(base / name, inner / name)
        return True

    def _make_room(self, needed: int, entry: Path) -> bool:
        _remove_half_written(entry)
        others = {path: _folder_bytes(path) for path in self._entries() if path != entry}
        free = shutil.disk_usage(self.folder).free - self.min_free_bytes
        if entry.is_dir():
            free += _folder_bytes(entry)
        for path in sorted(others, key=_last_used):
            if needed <= free and needed + sum(others.values()) <= self.max_bytes:
                break
            lock = take_lock(_lock_of(path))
            if lock is None:
                continue
            with lock:
                free += others.pop(path)
                shutil.rmtree(path)
                _remove_half_written(path)
        if needed <= free and needed + sum(others.values()) <= self.max_bytes:
            return True
        log.warning(
            "The weights in 4 bits are not kept for the next start: they need %.1f GiB, and there "
            "is no such room in %s.",
            needed / _GIB,
            self.folder,
        )
        return False

    def _entries(self) -> list[Path]:
        return [p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".")]


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.lock")


def _last_used(entry: Path) -> float:
    manifest = entry / MANIFEST
    return manifest.stat().st_mtime if manifest.exists() else 0.0


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _remove_half_written(entry: Path) -> None:
    # Who holds the lock of an entry is its only writer: what lies here is of one that was killed.
    for path in entry.parent.glob(f".{entry.name}.*"):
        shutil.rmtree(path)


# ---- content ------------------------------------------------------------------------------------


def _files_of(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    """Return every tensor of a model by file; nothing is copied."""
    tensors: dict[str, torch.Tensor] = dict(model.state_dict())
    for name, parameter in four_bit_tensors(model):
        for part, value in parameter.quant_state.as_dict(packed=True).items():
            tensors[f"{name}.{part}"] = value
    for name in model.all_tied_weights_keys:
        tensors.pop(name, None)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer = _LAYER.search(name)
        file = f"layer-{int(layer[1]):05d}" if layer else "outside"
        files.setdefault(f"{file}.safetensors", {})[name] = tensor
    return files


def _size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write(files: dict[str, dict[str, torch.Tensor]], folder: Path) -> None:
    weight_map = {}
    for name, tensors in files.items():
        # A copy of one file's tensors: safetensors refuses those that share their memory.
        content = {key: value.detach().cpu().clone() for key, value in tensors.items()}
        save_file(content, folder / name, metadata={"format": "pt"})
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        weight_map.update(dict.fromkeys(content, name))
    total = sum(_size(tensors) for tensors in files.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_whole(folder / "model.safetensors.index.json", json.dumps(index))
    sums = {name: _checksum(folder / name) for name in files}
    write_whole(folder / MANIFEST, json.dumps({"format": FORMAT, "files": sums}))


def _is_whole(entry: Path) -> bool:
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, list[int]] = manifest["files"]
        if manifest["format"] != FORMAT:
            return False
        # The files are read once here and come out of the page cache afterwards.
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(_checksum, (entry / name for name in files)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return found == list(files.values())


def _checksum(path: Path) -> list[int]:
    """Return size and CRC-32 of a file: against damage, not against malice."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return [0, 0]
        crc = 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            content.madvise(mmap.MADV_SEQUENTIAL)
            with memoryview(content) as view:
                for start in range(0, size, _CHUNK_BYTES):
                    crc = zlib.crc32(view[start : start + _CHUNK_BYTES], crc)
    return [size, crc]
