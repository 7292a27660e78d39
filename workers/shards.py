"""Read the weights of a Hugging Face folder tensor by tensor: one safetensors file, or several.

Layout: https://huggingface.co/docs/safetensors and the index file of transformers' save_pretrained.
Not covered: pickle files (*.bin, *.pt), which can run code when they are read.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from studio.errors import EngineError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """Where each tensor of a model lies.

    Attributes:
        folder: The Hugging Face folder.
        files: Names of the shards, in the order of their first tensor.
        file_of: Shard of each tensor.
        layout_of: Shape and dtype of each tensor, as in ((512, 256), "BF16").
    """

    folder: Path
    files: tuple[str, ...]
    file_of: dict[str, str]
    layout_of: dict[str, tuple[tuple[int, ...], str]]

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    def keys(self, file: str) -> list[str]:
        """Return the tensors of one shard."""
        return [key for key, name in self.file_of.items() if name == file]

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            EngineError: Its shard is damaged.
        """
        with open_shard(self.folder / self.file_of[key]) as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor

    def describe(self, key: str) -> tuple[tuple[int, ...], str]:
        """Return shape and dtype of a tensor, as in ((512, 256), "BF16")."""
        return self.layout_of[key]

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Any]]:
        """Yield a function that returns a tensor of which only the indexed part is read.

        Shards stay open in between: opening one reads its whole list of tensors.

        Raises:
            EngineError: A shard is damaged.
        """
        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def view(key: str) -> Any:
                name = self.file_of[key]
                if name not in opened:
                    opened[name] = stack.enter_context(open_shard(self.folder / name))
                return opened[name].get_slice(key)

            yield view


def find_shards(folder: Path) -> Shards:
    """List the tensors of a model folder.

    Raises:
        EngineError: There are no safetensors, a shard is missing or damaged, or the index names
            other tensors than the shards hold.
    """
    if (folder / INDEX).is_file():
        listed = _weight_map(folder / INDEX)
    elif (folder / SINGLE).is_file():
        listed = None
    else:
        raise EngineError(
            f"The model in {folder} has neither {SINGLE} nor {INDEX}.",
            "Choose weights that were published as safetensors.",
        )
    files = tuple(dict.fromkeys(listed.values())) if listed is not None else (SINGLE,)
    file_of: dict[str, str] = {}
    layout_of: dict[str, tuple[tuple[int, ...], str]] = {}
    for name in files:
        with open_shard(folder / name) as shard:
            for key in shard.keys():
                view = shard.get_slice(key)
                file_of[key] = name
                layout_of[key] = tuple(view.get_shape()), str(view.get_dtype())
    if listed is not None and listed != file_of:
        odd = sorted(key for key in {*listed, *file_of} if listed.get(key) != file_of.get(key))
        raise EngineError(
            f"The index of {folder} and its shards disagree about {odd[0]}.",
            "Compare the folder with the published one; a download may be incomplete.",
        )
    return Shards(folder=folder, files=files, file_of=file_of, layout_of=layout_of)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(name) for key, name in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"The index {index} cannot be read.",
            "Compare the folder with the published one; a download may be incomplete.",
        ) from error


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open one safetensors file for reading.

    Raises:
        EngineError: It is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (FileNotFoundError, SafetensorError) as error:
        raise EngineError(
            f"The weights {path} cannot be read: {str(error).splitlines()[0]}.",
            "Compare the folder with the published one; a download may be incomplete.",
        ) from error


def changed_tensors(base: Shards, written: Shards) -> tuple[str, ...]:
    """Compare two models bit for bit, shard by shard.

    Returns:
        Names of the tensors that differ, that only one of the two has, or that moved to another
        shard.
    """
    changed = {key for key, _name in base.file_of.items() ^ written.file_of.items()}
    for name in base.files:
        same_place = [key for key in base.keys(name) if key not in changed]
        if same_place:
            with open_shard(base.folder / name) as one, open_shard(written.folder / name) as other:
                changed.update(
                    key
                    for key in same_place
                    if not same_bits(one.get_tensor(key), other.get_tensor(key))
                )
    return tuple(sorted(changed))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bytes; NaN equals the same NaN here."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
