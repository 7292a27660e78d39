"""Micro-batches of examples, padded on the right. Which examples make a step: studio.tokens.order.

Not covered: packing (state of the delta net would leak across examples without special kernels).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from studio.tokens.counts import num_supervised
from studio.tokens.examples import Example

# B rows, T tokens
IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Examples of one forward pass, padded on the right.

    Attributes:
        tokens: (B, T), int64.
        mask: (B, T), int64, 1 for real tokens and 0 for padding.
        labels: (B, T), int64, IGNORED where nothing is supervised.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on another device."""
        return MicroBatch(
            tokens=self.tokens.to(device),
            mask=self.mask.to(device),
            labels=self.labels.to(device),
        )


def micro_batches(
    examples: Sequence[Example], size: int, pad_token_id: int
) -> Iterator[MicroBatch]:
    """Cut the examples of a step into micro-batches of `size`, each padded to its longest."""
    for start in range(0, len(examples), size):
        yield _collate(examples[start : start + size], pad_token_id)


def count_supervised(examples: Sequence[Example]) -> int:
    """Return the tokens of some examples that count in the loss."""
    return sum(num_supervised(example.mask) for example in examples)


def _collate(examples: Sequence[Example], pad_token_id: int) -> MicroBatch:
    width = max(len(example.tokens) for example in examples)
    tokens_BT = torch.full((len(examples), width), pad_token_id)
    mask_BT = torch.zeros((len(examples), width), dtype=torch.long)
    labels_BT = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        # A copy: the arrays are views of a file that cannot be written.
        tokens_T = torch.from_numpy(example.tokens.astype(np.int64))
        tokens_BT[row, :length] = tokens_T
        mask_BT[row, :length] = 1
        labels_BT[row, :length] = torch.where(
            torch.from_numpy(example.mask.copy()), tokens_T, IGNORED
        )
    return MicroBatch(tokens=tokens_BT, mask=mask_BT, labels=labels_BT)
