"""What a Dataset is for one model, in its own tokens: lengths, losses by truncation, steps."""

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from studio.domain.reading import Truncation
from studio.domain.section import Section
from studio.domain.train_spec import BatchSpec, TrainSpec
from studio.tokens.cache import TokenCache
from studio.tokens.counts import LISTED, Refused
from studio.tokens.fitted import Fitted
from studio.tokens.order import Order, Part
from studio.tokens.packing import Packing, packing

MAX_BINS = 32
# A chart of all lengths is one tall bar when a single example is very long: what is longer than
# this share of the examples goes into the last bin.
_SHOWN_SHARE = 0.995


class Bin(Section):
    """Examples of one range of lengths: first included, end excluded."""

    first: int
    end: int
    examples: int


class Lengths(Section):
    """Tokens of the examples, untruncated."""

    bins: tuple[Bin, ...] = ()
    shortest: int = 0
    median: int = 0
    mean: float = 0.0
    longest: int = 0


class Cut(Section):
    """What the cutoff does.

    Attributes:
        conversations: Conversations with an example that is too long.
        lost_tokens: Tokens that are not trained on because of it.
        nothing_left: Conversations without a supervised token after it, and the first of their
            lines, from 1.
        shortest_needed: Least cutoff at which any too long example keeps a supervised token.
    """

    max_length_tokens: int | None
    policy: str
    examples: int
    conversations: int
    lost_tokens: int
    lost_supervised: int
    num_nothing_left: int
    nothing_left: tuple[int, ...]
    shortest_needed: int | None


class Epoch(Section):
    """What one pass over a Dataset, or a mixture, is.

    Attributes:
        is_packed: Whether micro-batches are rows filled with examples, or examples padded.
        efficiency: Share of real tokens in the micro-batches; what is left is padding, or, in
            packed rows, room that no example fits into.
        steps: Optimizer steps of the whole run; 0 when there is nothing to train.
    """

    conversations: float
    examples: int
    tokens: int
    supervised: int
    is_packed: bool
    efficiency: float
    steps: int


class Thinking(Section):
    """Conversations by what their assistants think.

    Attributes:
        left_out: Conversations whose thinking this model's template does not write.
    """

    conversations: int
    empty: int
    left_out: int


class Statistics(Section):
    """A Dataset in the tokens of one model.

    Attributes:
        supervised: Tokens that count in the loss.
        exchanges: Conversations by their number of user turns.
        tools: Calls of each tool, most used first.
        refused: First conversations that the template refuses; number from 0.
    """

    conversations: int
    examples: int
    tokens: int
    supervised: int
    share_supervised: float = Field(ge=0, le=1)
    lengths: Lengths
    cut: Cut
    packing: Packing
    epoch: Epoch
    thinking: Thinking
    roles: dict[str, int]
    exchanges: dict[int, int]
    tools: dict[str, int]
    num_refused: int
    refused: tuple[Refused, ...]
    is_fast: bool
    why_slow: str


def statistics(
    cache: TokenCache,
    rule: Truncation,
    batch: BatchSpec,
    train: TrainSpec,
    packing_tokens: int | None = None,
) -> Statistics:
    """Count a Dataset as one model reads it.

    Args:
        cache: Its examples, untruncated.
        rule: What happens to long ones.
        batch: For the predicted steps.
        train: For the predicted steps.
        packing_tokens: Length for packing; the cutoff, or the longest example, when None.
    """
    counts, fitted = cache.meta.counts, Fitted(cache, rule)
    cutoff = rule.max_length_tokens or int(cache.lengths.max(initial=1))
    return Statistics(
        conversations=counts.num_conversations,
        examples=len(cache),
        tokens=counts.num_tokens,
        supervised=counts.num_supervised,
        share_supervised=counts.num_supervised / max(1, counts.num_tokens),
        lengths=_lengths(cache.lengths, rule.max_length_tokens),
        cut=_cut(cache, fitted, rule),
        packing=packing(fitted.lengths, packing_tokens or cutoff),
        epoch=mixture_plan({"": (fitted, 1.0)}, batch, train, cutoff).total,
        thinking=Thinking(
            conversations=counts.with_thinking,
            empty=counts.with_empty_think,
            left_out=counts.thinking_left_out,
        ),
        roles=counts.roles,
        exchanges=counts.exchanges,
        tools=counts.tools,
        num_refused=counts.num_refused,
        refused=counts.refused,
        is_fast=cache.meta.is_fast,
        why_slow=cache.meta.why_slow,
    )


class Share(Section):
    """A Dataset's part of one epoch of a mixture."""

    dataset: str
    weight: float
    conversations: float
    examples: int
    tokens: int


class MixturePlan(Section):
    """What an epoch of a mixture holds, by Dataset and together."""

    parts: tuple[Share, ...]
    total: Epoch


def mixture_plan(
    datasets: Mapping[str, tuple[Fitted, float]],
    batch: BatchSpec,
    train: TrainSpec,
    max_length_tokens: int,
) -> MixturePlan:
    """Return what an epoch of a mixture holds.

    Args:
        datasets: Examples as they are trained, and the weight, of each Dataset by name.
        batch: For the predicted steps.
        train: For the predicted steps.
        max_length_tokens: Longest example: with packing it decides how long rows are.

    Returns:
        The plan. Examples are exact; tokens and conversations of a weight that is not whole are
        the mean over epochs.
    """
    shares, parts, supervised = [], list[Part](), 0.0
    for name, (fitted, weight) in datasets.items():
        part = Part(num_examples=len(fitted), weight=weight)
        often = part.per_epoch / max(1, len(fitted))
        parts.append(part)
        supervised += often * int(fitted.supervised.sum())
        shares.append(
            Share(
                dataset=name,
                weight=weight,
                conversations=often * len(np.unique(fitted.lines)),
                examples=part.per_epoch,
                tokens=round(often * int(fitted.lengths.sum())),
            )
        )
    lengths = np.concatenate([fitted.lengths for fitted, _ in datasets.values()])
    examples = sum(share.examples for share in shares)
    order = None
    if examples:
        order = Order(
            lengths, batch, train, max_length_tokens=max_length_tokens, parts=tuple(parts)
        )
    total = Epoch(
        conversations=sum(share.conversations for share in shares),
        examples=examples,
        tokens=sum(share.tokens for share in shares),
        supervised=round(supervised),
        is_packed=batch.packing,
        efficiency=order.efficiency() if order else 0.0,
        steps=order.total_steps if order else 0,
    )
    return MixturePlan(parts=tuple(shares), total=total)


def _lengths(lengths: np.ndarray, cutoff: int | None) -> Lengths:
    if not len(lengths):
        return Lengths()
    shown = max(int(np.quantile(lengths, _SHOWN_SHARE)), cutoff or 0)
    shown = min(shown, int(lengths.max()))
    width = 1
    while width * (MAX_BINS - 1) <= shown:
        width *= 2
    numbers = np.minimum(lengths // width, shown // width + 1)
    found = np.bincount(numbers, minlength=1)
    bins = [
        Bin(first=number * width, end=(number + 1) * width, examples=int(count))
        for number, count in enumerate(found)
    ]
    if len(bins) > shown // width + 1:
        bins[-1] = bins[-1].model_copy(update={"end": int(lengths.max()) + 1})
    return Lengths(
        bins=tuple(bins),
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
    )


def _cut(cache: TokenCache, fitted: Fitted, rule: Truncation) -> Cut:
    left, counts = fitted.nothing_left(), cache.meta.counts
    first = sorted([*left[:LISTED].tolist(), *counts.unsupervised])[:LISTED]
    return Cut(
        max_length_tokens=rule.max_length_tokens,
        policy=rule.policy,
        examples=len(fitted.long),
        conversations=len(np.unique(cache.lines[fitted.long])),
        lost_tokens=fitted.lost_tokens,
        lost_supervised=fitted.lost_supervised,
        num_nothing_left=len(left) + counts.num_unsupervised,
        nothing_left=tuple(number + 1 for number in first),
        shortest_needed=fitted.shortest_needed(),
    )
