"""The split keeps groups whole; the overlap of two Datasets is found."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.domain.conversation import Conversation, Message
from studio.intake.canonical import Canonical, Writer
from studio.intake.split import overlap, split


def talk(question: str, answer: str) -> Conversation:
    return Conversation(
        messages=(
            Message(role="user", content=question),
            Message(role="assistant", content=answer),
        )
    )


@st.composite
def group_numbers(draw: st.DrawFn) -> np.ndarray:
    """Groups as an index has them: each number is that of the group's first record."""
    groups: list[int] = []
    for number in range(draw(st.integers(1, 60))):
        groups.append(
            groups[draw(st.integers(0, number - 1))] if number and draw(st.booleans()) else number
        )
    return np.array(groups, np.uint32)


@given(group_numbers(), st.floats(0.01, 0.5), st.integers(0, 2**32 - 1))
def test_a_split_keeps_groups_whole_and_both_sides_filled(
    groups: np.ndarray, share: float, seed: int
) -> None:
    chosen = split(groups, share, seed)
    assert np.array_equal(chosen, split(groups, share, seed))
    assert set(groups[chosen]) & set(groups[~chosen]) == set()
    if len(set(groups.tolist())) > 1:
        assert 0 < chosen.sum() < len(groups)
    else:
        assert not chosen.any()


@given(st.integers(20, 500), st.floats(0.05, 0.5), st.integers(0, 1000))
def test_a_split_without_groups_has_the_share_that_was_asked_for(
    count: int, share: float, seed: int
) -> None:
    assert split(np.arange(count, dtype=np.uint32), share, seed).sum() == round(share * count)


def test_the_seed_decides() -> None:
    groups = np.arange(1000, dtype=np.uint32)
    one, other = split(groups, 0.1, 1), split(groups, 0.1, 2)
    assert 0 < (one & other).sum() < 30
    # The same on every machine and in every version: a run that is repeated measures the same.
    assert np.flatnonzero(one)[:5].tolist() == [9, 36, 39, 55, 61]


def test_no_share_takes_nothing() -> None:
    assert not split(np.arange(10, dtype=np.uint32), 0.0, 1).any()
    assert not split(np.zeros(0, np.uint32), 0.5, 1).any()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_a_large_group_does_not_overfill_the_share(share: int) -> None:
    groups = np.array([0] * 500 + list(range(500, 1000)), np.uint32)
    assert split(groups, share, 3).sum() == round(share * 1000)


def stored(folder: Path, talks: list[Conversation]) -> Canonical:
    folder.mkdir()
    with Writer(folder) as writer:
        for record in talks:
            writer.add(record)
        written = writer.finish()
    return Canonical(written.path, written.index)


def test_overlap_counts_equal_and_nearly_equal_records(tmp_path: Path) -> None:
    generator = random.Random(2)
    texts = [[f"w{generator.randrange(5000)}" for _ in range(100)] for _ in range(30)]
    talks = [talk("Tell me.", " ".join(text)) for text in texts]
    close = talk("Tell me.", " ".join([*texts[7][:50], "other", *texts[7][51:]]))
    with (
        stored(tmp_path / "train", talks[:20]) as train,
        stored(tmp_path / "eval", [talks[25], talks[4], close, talks[26], talks[26]]) as measured,
    ):
        found = overlap(train, measured, tmp_path)
        assert (found.num_eval, found.exact, found.near) == (5, 1, 1)
        assert found.examples == ((1, 4), (2, 7))
        assert overlap(train, train).exact == 20
