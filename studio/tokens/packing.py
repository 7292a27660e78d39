"""How well examples fill fixed lengths: a figure for planning; the trainer pads and packs not yet.

Best-fit decreasing: longest example first, each into the fullest bin that still takes it. At most
11/9 of the fewest bins, plus 4: D. S. Johnson, Near-optimal bin packing algorithms, 1973.
"""

import numpy as np
from pydantic import Field

from studio.domain.section import Section


class Packing(Section):
    """How examples fill bins of one length.

    Attributes:
        bins: Bins that are needed.
        efficiency: Share of the bins that is real tokens, 0 to 1.
        num_too_long: Examples that fit into no bin, left out of the other figures.
    """

    length_tokens: int = Field(ge=1)
    bins: int = Field(ge=0)
    efficiency: float = Field(ge=0, le=1)
    num_too_long: int = Field(ge=0)


def packing(lengths: np.ndarray, length_tokens: int) -> Packing:
    """Pack examples into bins.

    Args:
        lengths: Tokens of each example.
        length_tokens: Tokens of a bin.
    """
    fitting = lengths[(lengths > 0) & (lengths <= length_tokens)]
    bins = _count_bins(fitting, length_tokens)
    return Packing(
        length_tokens=length_tokens,
        bins=bins,
        efficiency=int(fitting.sum()) / (bins * length_tokens) if bins else 0.0,
        num_too_long=int((lengths > length_tokens).sum()),
    )


def _count_bins(lengths: np.ndarray, length: int) -> int:
    """Return the bins of best-fit decreasing, in O(n log length) time and O(length) memory."""
    sizes, counts = np.unique(lengths, return_counts=True)
    rooms = _Rooms(length)
    bins = 0
    # All examples of one size at once: each pass fills every bin of the tightest room.
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            room = rooms.tightest(size)
            if room is None:
                fit = length // size
                full, rest = divmod(left, fit)
                bins += full + bool(rest)
                rooms.add(length - fit * size, full)
                if rest:
                    rooms.add(length - rest * size, 1)
                break
            # A bin that took one example is the tightest of all as long as it takes another.
            fit = min(room // size, left)
            used = min(rooms.count(room), left // fit)
            rooms.add(room, -used)
            rooms.add(room - fit * size, used)
            left -= fit * used
    return bins


class _Rooms:
    """How many bins have which room left: a binary tree whose nodes hold sums over rooms."""

    def __init__(self, length: int) -> None:
        self._size = 1 << (length + 1).bit_length()
        self._tree = [0] * (2 * self._size)

    def add(self, room: int, count: int) -> None:
        node = self._size + room
        while node:
            self._tree[node] += count
            node >>= 1

    def count(self, room: int) -> int:
        return self._tree[self._size + room]

    def tightest(self, size: int) -> int | None:
        """Return the least room of at least `size` that some bin has."""
        node = self._size + size
        if self._tree[node]:
            return size
        # Up until a right sibling holds bins, then down to its leftmost one.
        while node > 1:
            if node % 2 == 0 and self._tree[node + 1]:
                node += 1
                break
            node >>= 1
        else:
            return None
        while node < self._size:
            node = 2 * node if self._tree[2 * node] else 2 * node + 1
        return node - self._size
