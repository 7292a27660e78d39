"""Counts operations, bytes and shapes that a piece of code writes: a test of speed without a GPU."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OpProbe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation that runs inside it, in forward and in backward.

    Attributes:
        ops: Calls by name of the operation.
        shapes: Tensors that were written, by shape; views are none.
        num_bytes: Bytes of all of them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: Counter[str] = Counter()
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it wrote."""
        out = func(*args, **(kwargs or {}))
        self.ops[str(func)] += 1
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in given:
                self.shapes[tuple(tensor.shape)] += 1
                self.num_bytes += tensor.numel() * tensor.element_size()
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
