"""A bell makes a worker take what fits its machine, and disturbs nobody where nothing does."""

import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from studio.dispatch import Bell
from studio.domain.placement import Card, Placement
from studio.domain.run import RunState
from studio.store.rows import RunRow
from tests.fakes import FakeDispatch
from tests.rows import add_run, get_run, make_shop
from workers import tasks
from workers.app import Shop, configure
from workers.slots import Slots

TWO = "0, GPU-aa, H100, 81920, 0\n1, GPU-bb, H100, 81920, 0\n"


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return make_shop(tmp_path / "home")


@pytest.fixture
def two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose driver tells of two cards; nothing can be computed on them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{TWO}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


class Stale(Slots):
    """Slots as they were a moment ago: all were free."""

    def cards(self) -> list[Card]:
        """Return the cards."""
        return [card.model_copy(update={"is_taken": False}) for card in super().cards()]


@pytest.mark.usefixtures("two_cards")
def test_who_was_slower_on_one_card_takes_another(shop: Shop) -> None:
    run_id = add_run(shop.database)
    with shop.database.write() as session:
        session.get_one(RunRow, run_id).num_gpus = 1
    first = Slots(shop.home, "faster").take(Placement(fits=True, cards=(shop.slots.cards()[0],)), 1)
    assert first is not None
    with first:
        claimed = tasks.claim_run(replace(shop, slots=Stale(shop.home, shop.owner)))
        assert claimed is not None
        with claimed[1]:
            assert claimed[0].gpus == [1]


def test_a_bell_in_vain_waits_for_nobody(shop: Shop) -> None:
    add_run(shop.database)
    taken = shop.slots.take(Placement(fits=True), 1)
    assert taken is not None
    with taken, closing(sqlite3.connect(shop.database.path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert tasks.claim_run(shop) is None


def test_whoever_takes_a_run_wakes_the_next(shop: Shop) -> None:
    bells = FakeDispatch(shop.database)
    configure(replace(shop, bells=bells))
    run_ids = [add_run(shop.database) for _ in range(2)]
    tasks.train()
    assert {get_run(shop.database, number).state for number in run_ids} == {RunState.FAILED}
    # The first was rung for while the second still waited.
    assert (bells.rung, bells.waiting_when_rung) == ([Bell.TRAIN, Bell.TRAIN], [1, 0])
