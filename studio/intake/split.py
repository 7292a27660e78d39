"""Which records are kept for evaluation, and what two Datasets have in common."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from studio.intake.canonical import Canonical
from studio.intake.duplicates import Finder

MAX_EXAMPLES = 20


def split(groups: NDArray[np.uint32], share: float, seed: int) -> NDArray[np.bool_]:
    """Choose the records of the evaluation side; near-duplicates stay on one side.

    Groups are taken in a random order as long as they fit into the share, so that no more than
    the share is kept out of training. One group at least is taken, and one left.

    Args:
        groups: Of each record, the number of the first record of its group.
        share: Share of the records, 0 to 1.
        seed: Same seed and groups, same split.

    Returns:
        True where a record is evaluated; nowhere when the share is 0 or all are one group.
    """
    chosen = np.zeros(len(groups), np.bool_)
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if share <= 0 or len(names) < 2:
        return chosen
    # A bit generator's raw stream is the same in every version of numpy.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(names)), kind="stable")
    room = min(max(round(share * len(groups)), 1), len(groups) - 1)
    taken = np.zeros(len(names), np.bool_)
    for group in order.tolist():
        if sizes[group] <= room:
            taken[group] = True
            room -= int(sizes[group])
        if not room:
            break
    if not taken.any():  # every group is larger than the share
        taken[order[np.argmin(sizes[order])]] = True
    return taken[members]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Records of an evaluation Dataset that training sees too.

    Attributes:
        num_eval: Records of the evaluation Dataset.
        exact: How many of them are in the training Dataset.
        near: How many more are nearly equal to one there, or to one that is.
        examples: Numbers (evaluation, training) of the first ones, from 0.
    """

    num_eval: int
    exact: int
    near: int
    examples: tuple[tuple[int, int], ...]


def overlap(train: Canonical, evaluation: Canonical, folder: Path | None = None) -> Overlap:
    """Compare an evaluation Dataset with a training Dataset.

    Args:
        train: What is trained on.
        evaluation: What is measured.
        folder: Where a temporary file may lie; the system's folder for these when None.
    """
    both = len(train)
    with Finder(folder) as finder:
        for canonical in (train, evaluation):
            for number in range(len(canonical)):
                finder.add(canonical[number], canonical.line(number))
        found = finder.find(lambda n: train[n] if n < both else evaluation[n - both])
    groups = found.groups.astype(np.int64)
    in_train = np.flatnonzero(groups[both:] < both) + both
    is_exact = np.isin(finder.hashes()[in_train], finder.hashes()[:both])
    return Overlap(
        num_eval=len(evaluation),
        exact=int(is_exact.sum()),
        near=int((~is_exact).sum()),
        examples=tuple((int(n) - both, int(groups[n])) for n in in_train[:MAX_EXAMPLES]),
    )
