"""Full fine-tuning: what trains, in which precision, and the whole model that is written.

What trains: every weight of the text model: attention, delta net, experts and router, norms,
embeddings and head. Nothing of it is frozen. Vision tower and multi-token prediction are not
loaded; they are copied byte for byte into the model that is written.

Precision: the weights that the optimizer moves are float32 everywhere. At a learning rate of 1e-5 a
step is smaller than the distance of two bfloat16 numbers, so bfloat16 weights would stay where they
are (bfloat16 training, arXiv 2010.06192, section 3). On a CPU float32 also computes. On CUDA FSDP2
gathers a bfloat16 copy of one layer at a time and sums gradients in float32; with Adam that is
16 bytes a weight, shared out among the ranks.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from studio.domain.memory_state import trains_in_float32
from studio.domain.spec import JobSpec
from studio.errors import EngineError, MachineError, disk_errors
from studio.whole import whole_folder
from workers.engine.parallel import whole_tensor
from workers.engine.world import World
from workers.fence import Fence
from workers.shards import Shards, find_shards, open_shard

# The published Qwen3.5 holds the text model inside the class that also sees.
_INNER = "model.language_model."
_EXPERT = re.compile(r"(?P<module>.+\.mlp\.experts)\.(?P<expert>\d+)\.(?P<part>\w+_proj)\.weight")
_WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a tensor of a published model lies in the text model of transformers.

    Attributes:
        parameter: Name of the parameter, as in `model.layers.0.mlp.experts.gate_up_proj`.
        expert: Which row of a 3-D parameter; None means all of it.
        part: gate_proj and up_proj are the upper and the lower half of gate_up_proj.
    """

    parameter: str
    expert: int | None = None
    part: str = ""

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the tensor that is published, of the parameter."""
        if self.expert is None:
            return whole
        rows = whole[self.expert]
        half = rows.shape[0] // 2
        return {"gate_proj": rows[:half], "up_proj": rows[half:]}.get(self.part, rows)


def train_all(model: nn.Module) -> int:
    """Let every weight of a text model train.

    Returns:
        How many numbers that are.
    """
    model.requires_grad_(True)
    return sum(parameter.numel() for parameter in model.parameters())


def compute_dtype(spec: JobSpec, world: World) -> torch.dtype | None:
    """Return what `wrap` shall compute in; None is the dtype of the weights."""
    in_float32 = trains_in_float32(spec) and world.device.type == "cuda"
    return torch.bfloat16 if in_float32 else None


def place_of(key: str) -> Place | None:
    """Return where a tensor of a base lies in the text model; None when it is of another part."""
    if key.startswith(("mtp.", "model.visual.")):
        return None
    name = "model." + key.removeprefix(_INNER) if key.startswith(_INNER) else key
    if (match := _EXPERT.fullmatch(name)) is None:
        return Place(parameter=name)
    part = match["part"]
    fused = "down_proj" if part == "down_proj" else "gate_up_proj"
    return Place(parameter=f"{match['module']}.{fused}", expert=int(match["expert"]), part=part)


def save_full(
    model: nn.Module, base_folder: Path, folder: Path, world: World, fence: Fence | None = None
) -> None:
    """Write a whole Hugging Face folder, whole or not at all; all ranks call it, rank 0 writes.

    Shards, names of tensors and dtypes are those of the base, so whatever reads the base reads
    it: trained tensors are replaced, all others and all other files are copied.

    Args:
        model: The trained text model.
        base_folder: What it was loaded from.
        folder: Where the model shall stand; one that stands there is replaced.
        world: The processes of the run.
        fence: Asked before it stands there.

    Raises:
        FencedError: The run belongs to another worker by now.
        EngineError: The base lacks a tensor that was trained, or holds it in another shape.
        MachineError: The disk is full or read-only.
    """
    base = find_shards(base_folder)
    # A head that is tied to the embeddings has two names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = _places(base, parameters)
    if not world.is_main:
        for name in base.files:
            for parameter in _by_parameter(base.keys(name), places):
                whole_tensor(parameters[parameter].detach())
        return
    with disk_errors("writing the trained model"), whole_folder(folder) as inner:
        for name in base.files:
            _write_shard(base, name, parameters, places, inner)
        _copy_others(base_folder, inner)
        if fence is not None:
            fence.check()


def _write_shard(
    base: Shards,
    name: str,
    parameters: Mapping[str, nn.Parameter],
    places: Mapping[str, Place],
    target: Path,
) -> None:
    with open_shard(base.folder / name) as shard:
        metadata = shard.metadata()
        tensors = {key: shard.get_tensor(key) for key in base.keys(name)}
    for parameter, keys in _by_parameter(base.keys(name), places).items():
        whole = whole_tensor(parameters[parameter].detach()).cpu()
        for key in keys:
            trained = places[key].cut(whole)
            if trained.shape != tensors[key].shape:
                raise EngineError(
                    f"{key} has shape {tuple(tensors[key].shape)} in {base.folder}, but "
                    f"{tuple(trained.shape)} was trained.",
                    "Start the run anew with the base as it was published.",
                )
            tensors[key] = trained.to(tensors[key].dtype).contiguous().clone()
    try:
        save_file(tensors, target / name, metadata=metadata)
    except SafetensorError as error:
        # safetensors hides the error number of the disk in its text.
        raise MachineError(
            f"The shard {name} cannot be written: {error}.",
            "Free some space, or move the home folder with --home DIR.",
        ) from error


def _places(base: Shards, parameters: Mapping[str, nn.Parameter]) -> dict[str, Place]:
    """Return the place of each tensor that was trained.

    Raises:
        EngineError: The base lacks a tensor, so what was trained would be lost.
    """
    places = {key: place for key in base.file_of if (place := place_of(key)) is not None}
    places = {key: place for key, place in places.items() if place.parameter in parameters}
    found = {id(parameters[place.parameter]) for place in places.values()}
    lost = sorted(name for name, parameter in parameters.items() if id(parameter) not in found)
    if lost:
        raise EngineError(
            f"{len(lost)} trained weights have no place in {base.folder}, the first is {lost[0]}.",
            "Compare the folder with the published one; a download may be incomplete.",
        )
    return places


def _by_parameter(keys: Iterable[str], places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Return the tensors that each parameter fills, so that each is gathered once a shard."""
    grouped: dict[str, list[str]] = {}
    for key in keys:
        if key in places:
            grouped.setdefault(places[key].parameter, []).append(key)
    return grouped


def _copy_others(base_folder: Path, target: Path) -> None:
    """Copy what is not weights: configuration, tokenizer, chat template, index of the shards."""
    for path in sorted(base_folder.rglob("*")):
        name = path.relative_to(base_folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and path.suffix not in _WEIGHTS:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            # copyfile, not copy: a base may be read-only, and files of the hub cache are links.
            shutil.copyfile(path, target / name)
