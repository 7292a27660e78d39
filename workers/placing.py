"""Find the tensors of a base in which the parameters lie that an Adapter changes.

The text class that is trained calls a parameter `model.layers.N...`; a published checkpoint of a
model with a vision tower calls it `model.language_model.layers.N...`. The experts of a layer are
two parameters of the class, and on the disk either the same two (Qwen3.5), or three matrices for
each expert (Qwen3-Next, Qwen3), the gate being the first half of the rows of gate_up_proj:
transformers/conversion_mapping.py, "qwen2_moe".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig

from studio.errors import EngineError
from workers.adapter import Adapter, refuse
from workers.low_rank import Change, LowRank
from workers.shards import Shards

_SIXTEEN_OR_MORE_BITS = ("BF16", "F16", "F32")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Of the parameter, in the order of its rows: what each equal share of them is called by itself.
MATRICES_OF_AN_EXPERT = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which part of the Adapter one tensor of the base receives.

    Attributes:
        path: Parameter of the text model, as in Adapter.changes.
        expert: Whose matrix the tensor is; None where it holds the whole parameter.
        rows: Rows of that matrix which the tensor holds.
    """

    path: str
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))


def place(adapter: Adapter, base: Shards) -> dict[str, Place]:
    """Find the tensors of the base that an Adapter changes.

    Returns:
        What each of them receives, by the name of the tensor in the base's shards.

    Raises:
        EngineError: A parameter matches no tensor or more than one, its shape differs, it is
            stored in 8 bits or less, or it is one weight with another; all such are named.
    """
    placed: dict[str, Place] = {}
    wrong = []
    for path, change in adapter.changes.items():
        found = [_whole(name, path, change, base) for name in possible_names(path)]
        found += [_by_expert(name, path, change, base) for name in possible_names(path)]
        places = [one for one in found if one]
        if len(places) != 1 or places[0].keys() & placed.keys():
            wrong.append(path)
        else:
            placed.update(places[0])
    wrong += [path for path, copy in adapter.copies.items() if not _is_copy(path, copy, base)]
    refuse(base.folder, tensors=wrong)
    _refuse_tied(adapter, base)
    return placed


def possible_names(path: str) -> list[str]:
    """Return what a parameter of the text model may be called on the disk."""
    text = path.removeprefix("model.").removeprefix("language_model.")
    return list(dict.fromkeys((path, f"model.{text}", f"model.language_model.{text}")))


def changed(weight: torch.Tensor, where: Place, parts: Sequence[LowRank]) -> torch.Tensor:
    """Return what a tensor of the base becomes.

    Args:
        weight: The tensor; a stack of experts is changed in place, one expert at a time.
        where: What it receives.
        parts: `parts()` of the change at `where.path`.
    """
    if where.expert is not None:
        return parts[where.expert].of_rows(where.rows).added_to(weight)
    if weight.dim() == 2:
        return parts[0].added_to(weight)
    for expert, part in enumerate(parts):
        weight[expert] = part.added_to(weight[expert])
    return weight


def _whole(name: str, path: str, change: Change, base: Shards) -> dict[str, Place]:
    return {name: Place(path=path)} if _fits(name, change.shape, base) else {}


def _by_expert(name: str, path: str, change: Change, base: Shards) -> dict[str, Place]:
    """Return the places of a stack that the base holds as matrices of each expert, or none."""
    experts, _, parameter = name.rpartition(".")
    matrices = MATRICES_OF_AN_EXPERT.get(parameter)
    if matrices is None or isinstance(change, LowRank):
        return {}
    num_experts, out, in_ = change.shape
    rows = out // len(matrices)
    places = {
        f"{experts}.{expert}.{matrix}.weight": Place(
            path=path, expert=expert, rows=slice(number * rows, (number + 1) * rows)
        )
        for expert in range(num_experts)
        for number, matrix in enumerate(matrices)
    }
    is_whole = f"{experts}.{num_experts}.{matrices[0]}.weight" not in base.file_of
    fits = all(_fits(key, (rows, in_), base) for key in places)
    return places if fits and is_whole and rows * len(matrices) == out else {}


def _fits(key: str, shape: tuple[int, ...], base: Shards) -> bool:
    if key not in base.file_of:
        return False
    found, dtype = base.describe(key)
    return found == shape and dtype in _SIXTEEN_OR_MORE_BITS


def _is_copy(path: str, copy: torch.Tensor, base: Shards) -> bool:
    """Return whether a weight that lies beside a LoRA is the base's own."""
    keys = [name for name in possible_names(path) if name in base.file_of]
    if len(keys) != 1 or base.describe(keys[0])[0] != tuple(copy.shape):
        return False
    return torch.equal(base.read(keys[0]).to(copy.dtype), copy)


def _refuse_tied(adapter: Adapter, base: Shards) -> None:
    """Refuse to change embeddings that are the head as well.

    The Adapter changes one use of that weight, a merged weight would change both.
    """
    targeted = sorted({_EMBEDDING, _HEAD} & adapter.changes.keys())
    config = AutoConfig.from_pretrained(base.folder).get_text_config()
    if targeted and getattr(config, "tie_word_embeddings", False):
        raise EngineError(
            f"The Adapter changes {targeted[0]}, which is embeddings and head at once in this "
            f"base; a merge would change both.",
            "Chat with the Adapter, which needs no merge, or train without embeddings and head.",
        )
