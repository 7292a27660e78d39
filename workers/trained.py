"""What a run that trained a whole model has changed, tensor by tensor, as re-read from the disk.

There is no Adapter to compare with. What can be shown: nothing but the text model changed (vision
tower and multi-token prediction are bit for bit the base's), by how much each tensor changed, that
every number is finite, and that the folder holds what the run wrote.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from workers.carried import of_all_experts, shown_names
from workers.low_rank import BLOCK_VALUES, row_blocks
from workers.shards import Shards, changed_tensors

# What the text class loads; the rest of a checkpoint is copied from the base by the engine.
_TEXT = re.compile(r"(model\.language_model|model)\.(embed_tokens|layers|norm)\..+|lm_head\..+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """See the fields of Certificate that bear the same names."""

    targeted_tensors: tuple[str, ...]
    changed_tensors: tuple[str, ...]
    relative_change: dict[str, float]
    not_finite: tuple[str, ...]
    miswritten_tensors: tuple[str, ...]


def what_changed(base: Shards, trained: Shards, written: Shards) -> Training:
    """Compare a whole trained model with its base.

    Args:
        base: Shards of the base.
        trained: Shards that the run wrote.
        written: Shards of the Merge, which shall hold the same.
    """
    targeted = {key for key in base.file_of if _TEXT.fullmatch(key)}
    changed = set(changed_tensors(base, written))
    not_finite = []
    relative: dict[str, float] = {}
    with base.opened() as before, written.opened() as after:
        for key in sorted(changed & targeted):
            if written.layout_of.get(key) != base.describe(key):
                continue  # named by changed_tensors; shapes that differ have no difference
            share = _relative_change(before(key), after(key))
            name = of_all_experts(key)
            if math.isfinite(share):
                relative[name] = max(share, relative.get(name, 0.0))
            else:
                not_finite.append(key)
    # Another shape or dtype is no training, so such a tensor counts as not targeted.
    same = {key for key in targeted if written.layout_of.get(key) == base.describe(key)}
    return Training(
        targeted_tensors=shown_names(same, same ^ changed),
        changed_tensors=shown_names(changed, same ^ changed),
        relative_change=relative,
        not_finite=tuple(not_finite),
        miswritten_tensors=changed_tensors(trained, written),
    )


def _relative_change(before: Any, after: Any) -> float:
    """Return |after - before| / |before|; not finite where a value is not."""
    change = size = torch.zeros((), dtype=torch.float64)
    for place in _places(before.get_shape()):
        old, new = before[place].to(torch.float64), after[place].to(torch.float64)
        change = change + (new - old).square().sum()
        size = size + old.square().sum()
    # A tensor of zeros that moved, such as a fresh bias, has moved by all of itself.
    return float((change / size).sqrt()) if size else float(change.sqrt().clamp(max=1.0))


def _places(shape: list[int]) -> Iterator[Any]:
    """Cut a tensor into pieces that are small in float64."""
    if math.prod(shape) <= BLOCK_VALUES:
        yield slice(None)
    elif len(shape) == 2:
        yield from row_blocks(shape)
    else:
        yield from range(shape[0])
