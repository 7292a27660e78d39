"""Counts the bytes of tensors that are alive, exactly and at every operator: a measuring tool."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, follows every storage from the operator that makes it until it is freed.

    What an operator allocates and frees inside itself is not seen: workspaces of kernels.

    Args:
        given: Tensors that are alive before.

    Attributes:
        now: Bytes alive.
        peak: Most bytes that were alive at the end of an operator.
    """

    def __init__(self, given: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in given:
            self._note(tensor)

    def reset_peak(self) -> None:
        """Begin a new peak from what is alive now."""
        self.peak = self.now

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator, then note the storages of what it returns."""
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return found

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        num_bytes = storage.nbytes()

        def forget(_ref: object) -> None:
            del self._seen[key]
            self.now -= num_bytes

        self._seen[key] = weakref.ref(storage, forget)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
