"""Documents as chats have them: random ids, lengths of a log-normal, about 30 % supervised.

Ids are uniform over the vocabulary, never constants: a card runs faster on those.
"""

from collections.abc import Sequence

import numpy as np

from studio.tokens.examples import Example

# Mean length in tokens, spread of its logarithm, share of supervised tokens: performance of the
# padded form depends on them, so they stand in every result.
MEAN_TOKENS, SPREAD, SUPERVISED = 600, 0.8, 0.3
_LEAST_TOKENS = 16


def chat_lengths(total_tokens: int, *, seed: int) -> list[int]:
    """Return lengths of documents that fill a row of so many tokens exactly."""
    source = np.random.default_rng(seed)
    lengths: list[int] = []
    # A tiny row has several documents, too.
    mean, left = min(MEAN_TOKENS, total_tokens / 6), total_tokens
    while left:
        drawn = max(_LEAST_TOKENS, round(source.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD)))
        # The last one takes what is left.
        length = left if left - drawn < _LEAST_TOKENS else drawn
        lengths.append(length)
        left -= length
    return lengths


def random_examples(lengths: Sequence[int], vocabulary: int, *, seed: int) -> list[Example]:
    """Return documents of random ids; each ends with the reply that is supervised."""
    source = np.random.default_rng(seed)
    return [
        Example(
            line=number,
            tokens=source.integers(0, vocabulary, length, dtype=np.uint32),
            mask=np.arange(length) >= round((1 - SUPERVISED) * length),
            turns=np.zeros(1, dtype=np.uint32),
        )
        for number, length in enumerate(lengths)
    ]
