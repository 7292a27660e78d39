"""How much of an Adapter's change each tensor of a Merge carries, as re-read from the disk.

One matrix at a time, in blocks of rows: a stack of experts is measured expert by expert, gate and
up apart, so that a single lost, swapped or wrongly laid out expert is found and named.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from studio.domain.certificate import is_distorted
from studio.errors import EngineError
from workers.low_rank import row_blocks
from workers.meaning import Meaning
from workers.placing import possible_names
from workers.shards import Shards

# What the rows of an experts parameter are, from its first to its last: the text class splits the
# product with gate_up_proj into gate and up (transformers, Qwen3NextExperts.forward).
_ROLES = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}

# One expert of many: number 17 of `experts.17.up_proj.weight` or `experts.down_proj[17]`.
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)|(?<=\[)\d+(?=[,\]])")

_View = Callable[[str], Any]  # tensor name -> something that reads only what is indexed


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """One measured matrix.

    Attributes:
        name: The tensor, and which matrix of it: as in `...experts.gate_up_proj[17, gate]`.
        tensor: The tensor in the shards.
        kept: Share of the rounded change that is there; see Certificate.delta_kept.
        held: Share of the unrounded change that the precision can hold.
        is_idle: An expert of which, in this precision, the Adapter changes nothing: no token of
            the training met it.
    """

    name: str
    tensor: str
    kept: float
    held: float
    is_idle: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a Certificate says of the tensors; 70,000 matrices of experts in a few hundred lines.

    The experts of one layer that are in order are one name with `*` for their number, and the
    figure of the worst of them; every expert at fault keeps its own name.

    Attributes:
        targeted: Names of tensors that the Adapter changes.
        changed: Names of tensors that differ from the base.
        kept: Share of the change, by name; see Carried.
        held: The same.
        idle_experts: How many matrices of experts the Adapter leaves as they are.
    """

    targeted: tuple[str, ...]
    changed: tuple[str, ...]
    kept: dict[str, float]
    held: dict[str, float]
    idle_experts: int


def summed_up(measured: Iterable[Carried], changed: Iterable[str]) -> Summary:
    """Bring measured matrices into the form of a Certificate.

    Args:
        measured: Every matrix that the Adapter may change.
        changed: The tensors that differ from the base.
    """
    measured, changed = list(measured), set(changed)
    targeted = {one.tensor for one in measured if not one.is_idle}
    at_fault = (targeted ^ changed) | {one.tensor for one in measured if is_distorted(one.kept)}
    kept: dict[str, float] = {}
    held: dict[str, float] = {}
    for one in measured:
        name = one.name if is_distorted(one.kept) else of_all_experts(one.name)
        kept[name] = _worse(one.kept, kept.get(name, 1.0))
        held[name] = _worse(one.held, held.get(name, 1.0))
    return Summary(
        targeted=shown_names(targeted, at_fault),
        changed=shown_names(changed, at_fault),
        kept=kept,
        held=held,
        idle_experts=sum(one.is_idle for one in measured),
    )


def of_all_experts(name: str) -> str:
    """Return the name that all experts of a layer share."""
    return _EXPERT.sub("*", name)


def shown_names(tensors: set[str], at_fault: set[str]) -> tuple[str, ...]:
    """Return names as a Certificate gives them: experts of a layer as one, save those at fault."""
    return tuple(sorted({one if one in at_fault else of_all_experts(one) for one in tensors}))


def _worse(one: float, other: float) -> float:
    return one if abs(one - 1) > abs(other - 1) else other


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matrix:
    """Where one matrix of a parameter lies on the disk, and which part of the parameter it is."""

    name: str
    tensor: str
    index: int | None  # of the expert inside the tensor
    offset: int  # of its first row inside the tensor
    expert: int  # inside the parameter
    start: int  # its first row inside the parameter
    num_rows: int
    is_expert: bool


def changes_carried(
    meanings: Iterable[Meaning], base: Shards, written: Shards
) -> Iterator[Carried]:
    """Compare what each tensor carries with what the Adapter means.

    Args:
        meanings: What the Adapter means.
        base: Shards of the base.
        written: Shards of the merge.

    Raises:
        EngineError: The base has no tensor for something that the Adapter means.
    """
    with base.opened() as before, written.opened() as after:
        for meaning in meanings:
            for matrix in _matrices(meaning, base):
                layout = base.describe(matrix.tensor)
                if written.layout_of.get(matrix.tensor) == layout:
                    yield _measure(meaning, matrix, before, after)
                else:
                    yield Carried(
                        name=matrix.name, tensor=matrix.tensor, kept=0.0, held=1.0, is_idle=False
                    )


def _matrices(meaning: Meaning, base: Shards) -> Iterator[_Matrix]:
    """Yield where the matrices of one parameter lie."""
    num_experts, out, _rank = meaning.left.shape
    names = possible_names(meaning.path)
    whole = next((name for name in names if name in base.file_of), None)
    parameter = meaning.path.rpartition(".")[2]
    roles = _ROLES.get(parameter)
    if roles is None:
        if whole is None:
            raise _lost(meaning.path, base)
        yield _Matrix(
            name=whole,
            tensor=whole,
            index=None,
            offset=0,
            expert=0,
            start=0,
            num_rows=out,
            is_expert=False,
        )
        return
    num_rows = out // len(roles)
    for expert in range(num_experts):
        for number, role in enumerate(roles):
            start = number * num_rows
            if whole is not None:
                said = f"{expert}, {role}" if len(roles) > 1 else str(expert)
                name, tensor, index, offset = f"{whole}[{said}]", whole, expert, start
            else:
                own = [f"{n.rpartition('.')[0]}.{expert}.{role}_proj.weight" for n in names]
                found = next((one for one in own if one in base.file_of), None)
                if found is None:
                    raise _lost(own[0], base)
                name, tensor, index, offset = found, found, None, 0
            yield _Matrix(
                name=name,
                tensor=tensor,
                index=index,
                offset=offset,
                expert=expert,
                start=start,
                num_rows=num_rows,
                is_expert=True,
            )


def _lost(name: str, base: Shards) -> EngineError:
    return EngineError(
        f"The base in {base.folder} has no tensor for {name}, which the Adapter changes.",
        "Use an Adapter that was trained on this base model.",
    )


def _measure(meaning: Meaning, matrix: _Matrix, before: _View, after: _View) -> Carried:
    old, new = before(matrix.tensor), after(matrix.tensor)
    in_ = meaning.right.shape[2]
    # <done, rounded>, <rounded, rounded>, <rounded, meant>, <meant, meant>, <done, done>
    sums = torch.zeros(5, dtype=torch.float64)
    for rows in row_blocks((matrix.num_rows, in_)):
        here = slice(matrix.offset + rows.start, matrix.offset + rows.stop)
        there = slice(matrix.start + rows.start, matrix.start + rows.stop)
        was, became = _read(old, matrix.index, here), _read(new, matrix.index, here)
        exact = was.to(torch.float32)
        meant = meaning.change(matrix.expert, there, exact)
        rounded = (exact + meant).to(was.dtype).to(torch.float32) - exact
        done = became.to(torch.float32) - exact
        pairs = (
            (done, rounded),
            (rounded, rounded),
            (rounded, meant),
            (meant, meant),
            (done, done),
        )
        sums += torch.stack([_dot(one, other) for one, other in pairs])
    carried, size, held, meant_size, done_size = sums.tolist()
    # A change of nothing is carried in full by a tensor that did not change. That a targeted
    # layer did not change is a failure of its own; an expert that no token met is none.
    nothing = 1.0 if done_size == 0 else 0.0
    return Carried(
        name=matrix.name,
        tensor=matrix.tensor,
        kept=carried / size if size else nothing,
        held=held / meant_size if meant_size else 1.0,
        is_idle=matrix.is_expert and size == 0,
    )


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the product of two matrices as vectors: rows in float32, their sum in float64."""
    total: torch.Tensor = torch.linalg.vecdot(one, other).sum(dtype=torch.float64)
    return total


def _read(view: Any, index: int | None, rows: slice) -> torch.Tensor:
    tensor: torch.Tensor = view[rows] if index is None else view[index, rows]
    return tensor
