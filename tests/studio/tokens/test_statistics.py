"""Statistics against counting by hand; truncation exact; the plan of a mixture as it is trained."""

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studio.disk import TEMPLATES, Home
from studio.domain.conversation import Conversation, Message
from studio.domain.openai_messages import from_openai
from studio.domain.preset import load_models
from studio.domain.reading import Reading, Truncation
from studio.domain.train_spec import BatchSpec, TrainSpec
from studio.tokens.cache import TokenCache, build
from studio.tokens.fitted import Fitted
from studio.tokens.order import Order, Part
from studio.tokens.statistics import MAX_BINS, Statistics, mixture_plan, statistics
from studio.tokens.tiny import ensure_tiny_tokenizer
from studio.tokens.truncate import truncate
from tests.fakes import make_home

BATCH = BatchSpec(micro_batch_size=4, gradient_accumulation_steps=2)
POLICIES = ("refuse", "cut", "split")


def examples() -> list[Conversation]:
    text = (TEMPLATES / "data" / "tidemark-support.jsonl").read_text(encoding="utf-8")
    return [from_openai(json.loads(line)) for line in text.splitlines()]


def chatter(turns: int) -> Conversation:
    messages = [
        message
        for turn in range(turns)
        for message in (
            Message(role="user", content=f"And tide {turn}? " * (turn % 5 + 1)),
            Message(role="assistant", content=f"It is number {turn}. " * (turn % 7 + 1)),
        )
    ]
    system = Message(role="system", content="You know every tide.")
    return Conversation(messages=(system, *messages))


def records() -> list[Conversation]:
    ask, mute = Message(role="user", content="a"), Message(role="assistant", content="b", weight=0)
    return [
        *examples(),
        *(chatter(turns) for turns in (1, 3, 9, 20)),
        Conversation(messages=(ask, mute)),
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, verdicts: Path) -> Home:
    return make_home(tmp_path_factory.mktemp("home"), verdicts)


def make(home: Home, model: str, conversations: list[Conversation]) -> TokenCache:
    known = load_models(TEMPLATES / "models")[model]
    content = b"".join(record.to_line() for record in conversations)
    digest = sha256(content).hexdigest()
    home.dataset(digest).write_bytes(content)
    folder = ensure_tiny_tokenizer(known, home.tiny_tokenizer(model))
    return build(home, digest, folder, Reading())


@pytest.fixture(scope="module", params=["tiny/qwen3.5", "tiny/qwen3-next"])
def cache(request: pytest.FixtureRequest, home: Home) -> TokenCache:
    return make(home, request.param, records())


def count(cache: TokenCache, cutoff: int | None = None, policy: Any = "refuse") -> Statistics:
    rule = Truncation(max_length_tokens=cutoff, policy=policy)
    return statistics(cache, rule, BATCH, TrainSpec(epochs=3))


def test_whole_examples_lose_nothing(cache: TokenCache) -> None:
    found = count(cache)
    assert found.conversations == len(records())
    assert found.examples == len(cache)
    assert found.tokens == found.epoch.tokens == int(cache.lengths.sum())
    assert found.supervised == found.epoch.supervised == int(cache.supervised.sum())
    assert found.share_supervised == found.supervised / found.tokens
    assert (found.cut.examples, found.cut.lost_tokens, found.cut.shortest_needed) == (0, 0, None)
    # The reply without weight.
    assert (found.cut.num_nothing_left, found.cut.nothing_left) == (1, (len(records()),))


def test_what_is_counted_of_conversations_is_what_they_hold(cache: TokenCache) -> None:
    found = count(cache)
    messages = [message for record in records() for message in record.messages]
    assert found.roles == Counter(message.role for message in messages)
    assert found.tools == Counter(call.name for m in messages for call in m.tool_calls)
    assert sum(found.exchanges.values()) == found.conversations
    assert found.exchanges[20] == 1
    thinkers = sum(any(m.reasoning_content for m in r.messages) for r in records())
    assert found.thinking.conversations == thinkers > 0
    # Qwen3-Next Instruct does not write thinking; Qwen3.5 does.
    assert found.thinking.left_out in (0, thinkers)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cutoff", [16, 64, 128, 300])
def test_truncation_is_counted_exactly(cache: TokenCache, cutoff: int, policy: Any) -> None:
    rule = Truncation(max_length_tokens=cutoff, policy=policy)
    truncated = [truncate(example, rule) for example in cache]
    pieces = [
        (e.line, piece) for e, t in zip(cache, truncated, strict=True) for piece in t.examples
    ]
    found = count(cache, cutoff, policy).cut
    assert found.examples == int((cache.lengths > cutoff).sum())
    assert found.lost_tokens == sum(one.lost_tokens for one in truncated)
    assert found.lost_supervised == sum(one.lost_supervised for one in truncated)
    left = {line for line, _ in pieces}
    nothing = sorted(set(range(len(records()))) - left)
    assert found.num_nothing_left == len(nothing)
    assert list(found.nothing_left) == [number + 1 for number in nothing[:20]]
    fitted = Fitted(cache, rule)
    assert len(fitted) == len(pieces)
    for one, (_, piece) in zip(fitted, pieces, strict=True):
        assert np.array_equal(one.tokens, piece.tokens)
        assert np.array_equal(one.mask, piece.mask)
    assert fitted.lengths.tolist() == [len(piece.tokens) for _, piece in pieces]
    assert fitted.supervised.tolist() == [int(piece.mask[1:].sum()) for _, piece in pieces]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_shortest_needed_is_the_least_that_helps(cache: TokenCache, policy: Any) -> None:
    cutoff = 16
    needed = count(cache, cutoff, policy).cut.shortest_needed
    assert needed is not None
    helps = Fitted(cache, Truncation(max_length_tokens=needed, policy=policy))
    not_yet = Fitted(cache, Truncation(max_length_tokens=needed - 1, policy=policy))
    assert len(helps) > len(not_yet) == 0


def test_a_chosen_part_is_all_that_counts(cache: TokenCache) -> None:
    chosen = np.zeros(len(records()), dtype=np.bool_)
    chosen[[3, 7, 203]] = True
    fitted = Fitted(cache, Truncation(max_length_tokens=64, policy="cut"), chosen)
    assert set(fitted.lines.tolist()) <= {3, 7, 203}
    assert set(fitted.lines.tolist()) | set(fitted.nothing_left().tolist()) == {3, 7, 203}


def test_bins_hold_every_example_once(cache: TokenCache) -> None:
    for cutoff in (None, 16, 100, 4000):
        found = count(cache, cutoff).lengths
        assert len(found.bins) <= MAX_BINS + 1
        assert sum(one.examples for one in found.bins) == len(cache)
        for one in found.bins:
            inside = (cache.lengths >= one.first) & (cache.lengths < one.end)
            assert one.examples == int(inside.sum())
        assert [one.first for one in found.bins[1:]] == [one.end for one in found.bins[:-1]]
        assert (found.shortest, found.longest) == (cache.lengths.min(), cache.lengths.max())


def test_one_very_long_example_does_not_flatten_the_chart(home: Home) -> None:
    talk = Conversation(
        messages=(
            Message(role="user", content="tide " * 50_000),
            Message(role="assistant", content="Yes."),
        )
    )
    cache = make(home, "tiny/qwen3-next", [*examples() * 2, talk])
    found = count(cache, 512).lengths
    assert found.bins[-1].examples == 1
    assert found.bins[-1].end == found.longest + 1
    assert sum(one.examples > 0 for one in found.bins) > 4


def test_statistics_survive_json_and_an_empty_dataset(home: Home, cache: TokenCache) -> None:
    found = count(cache, 100, "split")
    assert Statistics.model_validate_json(found.model_dump_json()) == found
    empty = count(make(home, "tiny/qwen3.5", []), 100)
    assert (empty.examples, empty.epoch.steps, empty.lengths.bins) == (0, 0, ())
    nothing = count(cache, 16, "cut")
    assert (nothing.epoch.examples, nothing.epoch.steps, nothing.packing.bins) == (0, 0, 0)


@pytest.mark.parametrize("packs", [False, True])
def test_the_plan_of_a_mixture_is_what_is_trained(
    home: Home, cache: TokenCache, packs: bool
) -> None:
    other = make(home, "tiny/qwen3.5", examples()[:40])
    rule = Truncation(max_length_tokens=128, policy="cut")
    datasets = {"a": (Fitted(cache, rule), 1.5), "b": (Fitted(other, rule), 2.0)}
    train, batch = TrainSpec(epochs=2), BATCH.model_copy(update={"packing": packs})
    plan = mixture_plan(datasets, batch, train, 128)
    lengths = np.concatenate([fitted.lengths for fitted, _ in datasets.values()])
    parts = tuple(Part(num_examples=len(f), weight=weight) for f, weight in datasets.values())
    order = Order(lengths, batch, train, max_length_tokens=128, parts=parts)
    rows = [row for step in order.steps() for row in step]
    assert (plan.total.steps, plan.total.is_packed) == (order.total_steps, packs)
    assert plan.total.examples == sum(part.per_epoch for part in parts)
    widths = [[int(lengths[index]) for index in row] for row in rows]
    trained = sum(map(sum, widths))
    assert plan.total.tokens * 2 == pytest.approx(trained, rel=0.1 if packs else 0.05)
    room = sum(4 * 128 if packs else len(row) * max(row) for row in widths)
    assert plan.total.efficiency == pytest.approx(trained / room, abs=1e-12)
    assert [share.dataset for share in plan.parts] == ["a", "b"]
    assert plan.parts[1].conversations == 2 * len(np.unique(datasets["b"][0].lines))
    assert plan.parts[1].tokens == 2 * int(datasets["b"][0].lengths.sum())
