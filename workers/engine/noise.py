"""NEFTune: noise on the embeddings while training (arXiv 2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from workers.engine.batches import MicroBatch

# B rows, T tokens, D hidden


def lengths_of(batch: MicroBatch) -> torch.Tensor:
    """Return the tokens of the document that each place of a micro-batch belongs to, (B, T)."""
    if batch.packed is not None:
        lengths_N = batch.packed.bounds.diff()
        return lengths_N[batch.packed.documents.long()]
    assert batch.mask is not None
    return batch.mask.sum(1, keepdim=True).expand_as(batch.tokens)


@contextmanager
def noisy_embeddings(
    embeddings: nn.Module, lengths_BT: torch.Tensor, alpha: float
) -> Iterator[None]:
    """Add noise to what an embedding layer returns, as long as it is in training mode.

    Each value of a document of L tokens gets noise drawn evenly from +-alpha / sqrt(L D)
    (section 3 of the paper). Documents of a packed row keep their own L.

    Args:
        embeddings: Maps tokens (B, T) to (B, T, D).
        lengths_BT: Tokens of the document that each place belongs to, any number where none is.
        alpha: 0 adds nothing.
    """
    if not alpha:
        yield
        return

    def add(module: nn.Module, _inputs: Any, embedded_BTD: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded_BTD
        size = embedded_BTD.shape[-1]
        bound_BT1 = (alpha / (lengths_BT.clamp(min=1) * size).sqrt()).unsqueeze(-1)
        # Drawn in float32: bfloat16 knows too few numbers between -1 and 1.
        drawn_BTD = torch.empty_like(embedded_BTD, dtype=torch.float32).uniform_(-1, 1)
        return embedded_BTD + (drawn_BTD * bound_BT1).to(embedded_BTD.dtype)

    hook = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
