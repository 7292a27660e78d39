"""The examples of a token cache as they are trained: truncated, and in one row.

Only examples that are longer than the cutoff are looked at; of the others the lengths tell all.
"""

from collections.abc import Iterator

import numpy as np

from studio.domain.reading import Truncation
from studio.tokens.cache import TokenCache
from studio.tokens.counts import num_supervised
from studio.tokens.examples import Example
from studio.tokens.truncate import truncate


class Fitted:
    """The examples of a cache after truncation.

    Args:
        cache: Untruncated examples.
        rule: What happens to long ones. `refuse` leaves them out; whether the run starts at all
            is the caller's choice, see `long`.
        conversations: Which conversations count: (N,), bool; all when None.

    Attributes:
        lengths: Tokens of each example: (n,), uint32.
        supervised: Supervised tokens of each: (n,), uint32.
        lines: Number of the conversation of each, from 0: (n,), uint32.
        long: Examples of the cache that are longer than the cutoff.
        lost_tokens: Tokens that truncation takes away.
        lost_supervised: Supervised ones among them.
    """

    def __init__(
        self, cache: TokenCache, rule: Truncation, conversations: np.ndarray | None = None
    ) -> None:
        self._cache, self._rule = cache, rule
        chosen = np.arange(len(cache), dtype=np.uint32)
        if conversations is not None:
            chosen = chosen[conversations[cache.lines]]
        self._conversations = np.unique(cache.lines[chosen])
        is_long = cache.lengths[chosen] > (rule.max_length_tokens or np.inf)
        self.long: np.ndarray = chosen[is_long]
        self.lost_tokens = self.lost_supervised = 0
        short = chosen[~is_long]
        cut = np.array(self._cut(), dtype=np.uint32).reshape(-1, 4)
        sources = np.concatenate([short, cut[:, 0]])
        order = np.argsort(sources, kind="stable")
        self._sources = sources[order]
        zeros = np.zeros(len(short), dtype=np.uint32)
        self._numbers = np.concatenate([zeros, cut[:, 1]])[order]
        self.lengths: np.ndarray = np.concatenate([cache.lengths[short], cut[:, 2]])[order]
        self.supervised: np.ndarray = np.concatenate([cache.supervised[short], cut[:, 3]])[order]
        self.lines: np.ndarray = cache.lines[self._sources]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[Example]:
        """Yield all examples."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """Return an example as it is trained."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = int(self._sources[index])
        example = self._cache[source]
        if len(example.tokens) <= (self._rule.max_length_tokens or np.inf):
            return example
        return truncate(example, self._rule).examples[int(self._numbers[index])]

    def nothing_left(self) -> np.ndarray:
        """Return the numbers of the conversations without any supervised token, ascending."""
        learned = np.unique(self.lines[self.supervised > 0])
        return np.setdiff1d(self._conversations, learned, assume_unique=True)

    def shortest_needed(self) -> int | None:
        """Return the least cutoff at which any long example keeps a supervised token.

        None when there is no long example with supervised tokens.
        """
        best: int | None = None
        for index in self.long.tolist():
            if not self._cache.supervised[index]:
                continue
            example = self._cache[index]
            if best is None or self._keeps(example, best - 1):
                best = self._least(example, best)
        return best

    def _cut(self) -> list[tuple[int, int, int, int]]:
        """Return source, number, length and supervised tokens of what is left of long examples."""
        found = []
        for index in self.long.tolist():
            cut = truncate(self._cache[index], self._rule)
            self.lost_tokens += cut.lost_tokens
            self.lost_supervised += cut.lost_supervised
            for number, piece in enumerate(cut.examples):
                found.append((index, number, len(piece.tokens), num_supervised(piece.mask)))
        return found

    def _keeps(self, example: Example, cutoff: int) -> bool:
        if cutoff < _LEAST_CUTOFF:
            return False
        rule = self._rule.model_copy(update={"max_length_tokens": cutoff})
        return bool(truncate(example, rule).examples)

    def _least(self, example: Example, most: int | None) -> int:
        low, high = _LEAST_CUTOFF, most or len(example.tokens)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._keeps(example, middle) else (middle + 1, high)
        return low


_LEAST_CUTOFF = 16  # of Truncation.max_length_tokens
