"""Cross-entropy over supervised tokens only, without the logits of all the others.

The hidden states at supervised positions are gathered first and go through the head in chunks
that are computed again in the backward pass: with 248,320 tokens of vocabulary the logits of one
2048-token example would be 2 GB in float32, and three times that in a plain cross-entropy.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from workers.engine.batches import IGNORED

# B rows, T tokens, N supervised tokens, D hidden, V vocabulary
CHUNK_TOKENS = 1024


def supervised_loss(
    hidden_BTD: torch.Tensor, labels_BT: torch.Tensor, head: nn.Module, *, num_supervised: int
) -> torch.Tensor:
    """Return this micro-batch's share of the step's mean cross-entropy.

    Summed over the micro-batches of a step it is the mean over all supervised tokens of the step,
    however the step was split. (Averaging each micro-batch first weighs tokens of sparse ones
    more: https://unsloth.ai/blog/gradient.)

    Args:
        hidden_BTD: Output of the last norm; position t predicts token t + 1.
        labels_BT: Token where supervised, IGNORED elsewhere.
        head: Maps hidden states to logits over the vocabulary.
        num_supervised: Supervised tokens of the whole step, all micro-batches together.

    Returns:
        Scalar, float32, in nats.
    """
    targets_BT = labels_BT[:, 1:]
    is_supervised_BT = targets_BT != IGNORED
    hidden_ND = hidden_BTD[:, :-1][is_supervised_BT]
    targets_N = targets_BT[is_supervised_BT]
    total = hidden_BTD.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets_N), CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        total = total + checkpoint(
            _chunk_sum, hidden_ND[rows], targets_N[rows], head, use_reentrant=False
        )
    return total / num_supervised


def _chunk_sum(hidden_ND: torch.Tensor, targets_N: torch.Tensor, head: nn.Module) -> torch.Tensor:
    logits_NV = head(hidden_ND).float()
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")
