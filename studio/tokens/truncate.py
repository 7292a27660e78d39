"""Cut examples that are too long, by whole turns, in tokens.

The tokens that are kept are those of the same conversation without the turns that are dropped,
rendered anew, because a turn begins with a token that is never merged with its neighbours. This
holds for every part that is kept: a template that rewrites history (Qwen3.5, Qwen3-Next Thinking)
writes it anew at each user query, so that only the last exchange of an example is supervised, and
parts without it, which would be written differently alone, are dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from studio.domain.reading import Truncation
from studio.tokens.examples import Example, Mask


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncated:
    """What is left of an example.

    Attributes:
        lost_tokens: Tokens that no example has any more.
        lost_supervised: Supervised ones among them.
        kept: For each token of the whole example, whether some example has it.
    """

    examples: tuple[Example, ...]
    lost_tokens: int
    lost_supervised: int
    kept: Mask


def truncate(example: Example, rule: Truncation) -> Truncated:
    """Return the examples that a rule makes of one; one without supervised tokens is dropped.

    `refuse` leaves nothing of an example that is too long. `cut` drops whole turns from the front;
    of a text without turns it keeps the beginning. `split` packs whole turns, each example with the
    system message, whose tokens and those of a greeting before the first user turn are learned
    once; a text without turns becomes windows. Nothing else is cut, so a turn that is too long by
    itself is lost.
    """
    limit = rule.max_length_tokens
    size = len(example.tokens)
    kept = np.zeros(size, dtype=np.bool_)
    pieces: list[Example] = []
    if limit is None or size <= limit:
        parts = iter([(0, size)])
    elif example.is_text:
        parts = _windows(size, limit, rule)
    else:
        parts = _parts(example, limit, rule)
    for start, end in parts:
        piece = _piece(example, start, end, kept)
        if piece.mask[1:].any():
            kept[: _prefix(example)] = True
            kept[start:end] = True
            pieces.append(piece)
    return Truncated(
        examples=tuple(pieces),
        lost_tokens=size - int(np.count_nonzero(kept)),
        lost_supervised=int(np.count_nonzero(example.mask & ~kept)),
        kept=kept,
    )


def _prefix(example: Example) -> int:
    return int(example.turns[0]) if len(example.turns) else 0


def _windows(size: int, limit: int, rule: Truncation) -> Iterator[tuple[int, int]]:
    if rule.policy == "cut":
        yield 0, limit
    elif rule.policy == "split":
        yield from ((start, min(start + limit, size)) for start in range(0, size, limit))


def _parts(example: Example, limit: int, rule: Truncation) -> Iterator[tuple[int, int]]:
    """Yield the ranges of whole turns that fit with the prefix."""
    room = limit - _prefix(example)
    starts = example.turns.tolist()
    bounds = [*starts, len(example.tokens)]
    if rule.policy == "cut":
        fits = [start for start in starts if bounds[-1] - start <= room]
        yield from ((start, bounds[-1]) for start in fits[:1])
    elif rule.policy == "split":
        first = 0
        for index in range(len(starts)):
            if bounds[index + 1] - bounds[first] > room:
                if first < index:
                    yield bounds[first], bounds[index]
                first = index
            if bounds[index + 1] - bounds[index] > room:
                first = index + 1
        if first < len(starts):
            yield bounds[first], bounds[-1]


def _piece(example: Example, start: int, end: int, kept: Mask) -> Example:
    """Return prefix and range as an example; what is kept already is not learned again."""
    prefix = min(_prefix(example), start)
    mask = example.mask & ~kept
    turns = example.turns[(example.turns >= start) & (example.turns < end)]
    return Example(
        line=example.line,
        tokens=np.concatenate([example.tokens[:prefix], example.tokens[start:end]]),
        mask=np.concatenate([mask[:prefix], mask[start:end]]),
        turns=(turns - np.uint32(start - prefix)).astype(np.uint32),
        unwritten=example.unwritten,
    )
