"""Best-fit packing: whole examples into rows of at most so many tokens.

Best-fit decreasing: longest example first, each into the fullest row that still takes it. At most
11/9 of the fewest rows, plus 4: D. S. Johnson, Near-optimal bin packing algorithms, 1973.

All of a Dataset packed at once would put each long example beside the same short ones in every
epoch, and all long ones first. So the shuffled stream is packed window by window. A window of
1,024 chats (lengths log-normal, mean 600, sigma 0.8) fills rows of 2,048 tokens to 99.3 %, of
4,096 to 99.2 % and of 8,192 to 98.9 %; one of 128 to 98.0, 97.1 and 94.7 %.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from pydantic import Field

from studio.domain.section import Section

WINDOW_EXAMPLES = 1024
# The last row of a window stays partly empty: with this many rows that costs at most 3 %.
WINDOW_ROWS = 32


class Packing(Section):
    """How examples fill rows of one length.

    Attributes:
        bins: Rows that are needed.
        efficiency: Share of the rows that is real tokens, 0 to 1.
        num_too_long: Examples that fit into no row, left out of the other figures.
    """

    length_tokens: int = Field(ge=1)
    bins: int = Field(ge=0)
    efficiency: float = Field(ge=0, le=1)
    num_too_long: int = Field(ge=0)


def packing(lengths: np.ndarray, length_tokens: int) -> Packing:
    """Pack examples as a run would: shuffled, window by window.

    Args:
        lengths: Tokens of each example.
        length_tokens: Tokens of a row.
    """
    fitting = lengths[(lengths > 0) & (lengths <= length_tokens)]
    # Any shuffle will do; a Dataset may stand sorted by length.
    fitting = fitting[np.random.RandomState(0).permutation(len(fitting))]
    mean = float(fitting.mean()) if len(fitting) else 1.0
    edges = window_edges(len(fitting), mean, length_tokens)
    bins = sum(count_rows(fitting[start:end], length_tokens) for start, end in pairwise(edges))
    return Packing(
        length_tokens=length_tokens,
        bins=bins,
        efficiency=int(fitting.sum()) / (bins * length_tokens) if bins else 0.0,
        num_too_long=int((lengths > length_tokens).sum()),
    )


def window_edges(num_examples: int, mean_tokens: float, row_tokens: int) -> list[int]:
    """Return where the windows of a stream of examples begin, and where the last one ends.

    Windows are of nearly one size: a last one of a few examples would fill no row.

    Args:
        num_examples: Examples of the stream.
        mean_tokens: Their mean length.
        row_tokens: Tokens of a row.
    """
    size = max(WINDOW_EXAMPLES, round(WINDOW_ROWS * row_tokens / max(1.0, mean_tokens)))
    windows = max(1, round(num_examples / size))
    return [num_examples * number // windows for number in range(windows + 1)]


def count_rows(lengths: np.ndarray, row_tokens: int) -> int:
    """Return how many rows `pack` makes of a window.

    Args:
        lengths: Tokens of each example of the window.
        row_tokens: Tokens of a row.
    """
    return len(best_fit(np.sort(lengths)[::-1].tolist(), row_tokens))


def pack(lengths: np.ndarray, row_tokens: int) -> list[np.ndarray]:
    """Return the rows of a window: places in `lengths`, longest example of a row first.

    Args:
        lengths: Tokens of each example of the window.
        row_tokens: Tokens of a row. An example that has more stands alone in its row.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    return [order[row] for row in best_fit(lengths[order].tolist(), row_tokens)]


def best_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Put each length into the fullest row that still takes it, in the given order.

    Args:
        lengths: Longest first for the bound that the module names.
        row_tokens: Tokens of a row.

    Returns:
        Rows, as places in `lengths`.
    """
    rows: list[list[int]] = []
    # Room left and number of each row in one integer, sorted: 0.4 microseconds an example for
    # windows of a thousand, where pairs would take four times as long to compare.
    many = len(lengths) + 1
    rooms: list[int] = []
    for place, length in enumerate(lengths):
        at = bisect_left(rooms, length * many)
        if at == len(rooms):
            if length < row_tokens:
                insort(rooms, (row_tokens - length) * many + len(rows))
            rows.append([place])
        else:
            room = rooms.pop(at)
            rows[room % many].append(place)
            insort(rooms, room - length * many)
    return rows
