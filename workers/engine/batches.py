"""Micro-batches of examples: padded on the right, or packed into one row.

Which examples make a micro-batch: studio.tokens.order. How a model keeps the documents of a packed
row apart: workers.engine.varlen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from studio.tokens.counts import num_supervised
from studio.tokens.examples import Example

# B rows, T tokens, N documents of a packed row
IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Where the documents of a packed row stand.

    Attributes:
        bounds: (N + 1,), int32: where each document begins, and where the last one ends.
        positions: (1, T), int64: place of each token in its document, from 0.
        documents: (1, T), int32: number of the document of each token, from 0.
        longest: Tokens of the longest document.
    """

    bounds: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    longest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Examples of one forward pass.

    Attributes:
        tokens: (B, T), int64; B is 1 where they are packed.
        labels: (B, T), int64, IGNORED where nothing is supervised, and at the first token of each
            example: what stands before it in a packed row belongs to another one.
        mask: (B, T), int64, 1 for real tokens and 0 for padding; None where they are packed.
        packed: Where the documents of the row stand; None where examples are padded.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None
    packed: Packed | None = None

    @property
    def num_examples(self) -> int:
        """How many examples it holds."""
        return len(self.tokens) if self.packed is None else len(self.packed.bounds) - 1

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on another device."""
        packed = self.packed
        if packed is not None:
            packed = replace(
                packed,
                bounds=packed.bounds.to(device),
                positions=packed.positions.to(device),
                documents=packed.documents.to(device),
            )
        return MicroBatch(
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            packed=packed,
        )

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a text model's forward pass.

        A packed row is told in every way that transformers 5.23 knows, because each part reads
        another: rotary embeddings `position_ids`, attention and delta rule `cu_seq_lens_*`, the
        convolution of causal_conv1d `seq_idx`. A mask would switch packing off.
        """
        if self.packed is None:
            return {"input_ids": self.tokens, "attention_mask": self.mask}
        bounds, longest = self.packed.bounds, self.packed.longest
        return {
            "input_ids": self.tokens,
            "position_ids": self.packed.positions,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": self.packed.documents,
        }


def collate(examples: Sequence[Example], pad_token_id: int, *, packed: bool) -> MicroBatch:
    """Make one micro-batch of some examples.

    Args:
        examples: At least one.
        pad_token_id: Fills the rest of a padded row.
        packed: Whether they become one row, one after the other, or a padded row each.
    """
    return _pack(examples) if packed else _pad(examples, pad_token_id)


def count_supervised(examples: Sequence[Example]) -> int:
    """Return the tokens of some examples that count in the loss."""
    return sum(num_supervised(example.mask) for example in examples)


def _pad(examples: Sequence[Example], pad_token_id: int) -> MicroBatch:
    width = max(len(example.tokens) for example in examples)
    tokens_BT = torch.full((len(examples), width), pad_token_id)
    mask_BT = torch.zeros((len(examples), width), dtype=torch.long)
    labels_BT = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens_BT[row, :length], labels_BT[row, :length] = _tokens_and_labels(example)
        mask_BT[row, :length] = 1
    return MicroBatch(tokens=tokens_BT, labels=labels_BT, mask=mask_BT)


def _pack(examples: Sequence[Example]) -> MicroBatch:
    rows = [_tokens_and_labels(example) for example in examples]
    lengths = [len(tokens) for tokens, _ in rows]
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    lengths_N = torch.tensor(lengths)
    documents_T = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), lengths_N)
    return MicroBatch(
        tokens=torch.cat([tokens for tokens, _ in rows])[None],
        labels=torch.cat([labels for _, labels in rows])[None],
        mask=None,
        packed=Packed(
            bounds=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
            positions=positions_T[None],
            documents=documents_T[None],
            longest=max(lengths),
        ),
    )


def _tokens_and_labels(example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    # A copy: the arrays are views of a file that cannot be written.
    tokens_T = torch.from_numpy(example.tokens.astype(np.int64))
    labels_T = torch.where(torch.from_numpy(example.mask.copy()), tokens_T, IGNORED)
    labels_T[:1] = IGNORED
    return tokens_T, labels_T
