"""What an Adapter does to one parameter: LoRA on a matrix or on a stack of experts, and DoRA.

Everything is summed in float32 and rounded once, block by block: a head of a quarter of a million
rows or a stack of 512 experts is never held in float32 as a whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

BLOCK_VALUES = 2**20  # 4 MiB in float32: stays in the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """The change of one matrix: W + scale * B @ A (LoRA, arXiv 2106.09685, section 4.1).

    With a magnitude it is DoRA's: each row of that sum, divided by its length and multiplied by
    its magnitude (arXiv 2402.09353, equation 5).

    Attributes:
        a: (rank, in), any float dtype.
        b: (out, rank), any float dtype.
        magnitude: (out), or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that is changed: (out, in)."""
        return (self.b.shape[0], self.a.shape[1])

    def parts(self) -> Sequence["LowRank"]:
        """Return the changes of the matrices that the parameter consists of: itself."""
        return (self,)

    def of_rows(self, rows: slice) -> "LowRank":
        """Return the change of some rows of the matrix."""
        magnitude = None if self.magnitude is None else self.magnitude[rows]
        return LowRank(a=self.a, b=self.b[rows], scale=self.scale, magnitude=magnitude)

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the changed (out, in) weight: summed in float32, rounded once to its dtype."""
        changed = torch.empty_like(weight)
        a = self.a.to(torch.float32)
        for rows in row_blocks(weight.shape):
            change = self.scale * (self.b[rows].to(torch.float32) @ a)
            block = weight[rows].to(torch.float32) + change
            if self.magnitude is not None:
                length = torch.linalg.vector_norm(block, dim=1)
                block *= (self.magnitude[rows].to(torch.float32) / length).unsqueeze(1)
            changed[rows] = block
        return changed


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsLowRank:
    """The change of a stack of matrices, each expert with an own pair, as PEFT lays them out.

    peft/tuners/lora/layer.py, ParamWrapper.get_delta_weight: in A the expert is the slowest index
    of a row, in B the fastest of a column.

    Attributes:
        a: (experts * rank, in), any float dtype.
        b: (out, rank * experts), any float dtype.
        rank: Of one expert.
    """

    a: torch.Tensor
    b: torch.Tensor
    rank: int
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that is changed: (experts, out, in)."""
        return (self.a.shape[0] // self.rank, self.b.shape[0], self.a.shape[1])

    def parts(self) -> Sequence[LowRank]:
        """Return the change of each expert; B is laid out anew once, for all of them."""
        num_experts, out, in_ = self.shape
        by_expert = self.b.reshape(out, self.rank, num_experts).permute(2, 0, 1).contiguous()
        return [
            LowRank(a=a, b=b, scale=self.scale)
            for a, b in zip(self.a.reshape(num_experts, self.rank, in_), by_expert, strict=True)
        ]


Change = LowRank | ExpertsLowRank


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Cut the rows of a matrix so that a block has at most 2**20 values, or one row."""
    rows, columns = shape
    step = max(1, BLOCK_VALUES // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
