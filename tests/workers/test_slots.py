"""Cards are shared out between workers by locks that die with their holder."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.disk import Home
from studio.domain.placement import Need, Placement, place
from workers import slots
from workers.slots import CPU, SlotError, Slots, Taken

HOLDS = (
    "import fcntl, sys, time\n"
    "file = open(sys.argv[1], 'a+')\n"
    "fcntl.flock(file, fcntl.LOCK_SH)\n"
    "print('held', flush=True)\n"
    "time.sleep(600)\n"
)
TWO = "0, GPU-aa, H100, 81920, 1024\n1, GPU-bb, H100, 81920, 51200\n"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(path=tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose driver tells of two cards; nothing can be computed on them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{TWO}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.fixture
def rank(home: Home) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the CPU as a rank of a run does."""
    with taken(Slots(home, "w")) as mine:
        path = mine.ranks[0]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def taken(machine: Slots) -> Taken:
    found = machine.take(Placement(fits=True), 1)
    assert found is not None
    return found


def test_the_cpu_is_one_slot_for_all_workers_of_a_home(home: Home) -> None:
    one, other = Slots(home, "one"), Slots(home, "other")
    assert other.cpu_is_free()
    with taken(one):
        assert not other.cpu_is_free()
        assert other.take(Placement(fits=True), 1) is None
        assert other.holder_of(CPU) == "one 1"
    assert other.cpu_is_free()
    with taken(other):
        assert one.holder_of(CPU) == "other 1"


@pytest.mark.usefixtures("two_cards")
def test_cards_that_are_taken_are_seen_by_all_and_never_given_twice(home: Home) -> None:
    one, other = Slots(home, "one"), Slots(home, "other")
    first = place(Need(num_gpus=1), one.cards(), cpu_is_free=True)
    assert [card.uuid for card in first.cards] == ["GPU-aa"]  # the one with more free memory
    mine = one.take(first, 1)
    assert mine is not None
    with mine:
        assert [card.is_taken for card in other.cards()] == [True, False]
        assert other.take(first, 1) is None
        both = place(Need(num_gpus=2), other.cards(), cpu_is_free=True)
        assert (both.fits, both.ever) == (False, True)
        assert both.why == "it needs 2 GPUs, and 1 of 2 is free"
        second = place(Need(num_gpus=1), other.cards(), cpu_is_free=True)
        assert [card.uuid for card in second.cards] == ["GPU-bb"]
    assert [card.is_taken for card in other.cards()] == [False, False]


@pytest.mark.usefixtures("two_cards")
def test_half_of_the_cards_are_not_kept_when_another_was_faster(home: Home) -> None:
    one, other = Slots(home, "one"), Slots(home, "other")
    both = place(Need(num_gpus=2), one.cards(), cpu_is_free=True)
    with taken_of(other, "GPU-bb"):
        assert one.take(both, 1) is None
        assert [card.is_taken for card in one.cards()] == [False, True]


def taken_of(machine: Slots, uuid: str) -> Taken:
    cards = [card for card in machine.cards() if card.uuid == uuid]
    found = machine.take(place(Need(num_gpus=1), cards, cpu_is_free=True), 1)
    assert found is not None
    return found


@pytest.mark.usefixtures("two_cards")
def test_memory_that_does_not_come_back_after_a_run_is_told(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "MEMORY_SECONDS", 0.0)
    machine = Slots(home, "w")
    mine = machine.take(place(Need(num_gpus=2), machine.cards(), cpu_is_free=True), 1)
    assert mine is not None
    with mine:
        assert mine.kept_back() == ""
        program = tmp_path / "bin" / "nvidia-smi"
        program.write_text(program.read_text().replace("81920, 1024", "81920, 41984"))
        words = "Memory that was free before the run is not free after it: 40 GiB on GPU 0."
        assert mine.kept_back() == words


def test_a_slot_is_proved_free_only_when_the_last_rank_is_dead(
    home: Home, rank: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with taken(Slots(home, "w")) as mine:
        monkeypatch.setattr(slots, "FREE_SECONDS", 0.3)
        with pytest.raises(SlotError, match="Processes of an earlier run still use cpu"):
            mine.prove_free()
        monkeypatch.setattr(slots, "FREE_SECONDS", 60.0)
        killer = threading.Timer(0.5, rank.kill)
        killer.start()
        mine.prove_free()
        assert rank.wait(10) < 0


def test_a_slot_with_ranks_that_do_not_end_is_not_free(
    home: Home, rank: subprocess.Popen[str]
) -> None:
    assert not Slots(home, "w").cpu_is_free()
    rank.kill()
    rank.wait()
    assert Slots(home, "w").cpu_is_free()


def test_a_slot_is_wrested_from_a_worker_only_for_the_run_that_it_was_lost_with(
    home: Home,
) -> None:
    machine = Slots(home, "w")
    with taken(machine):
        machine.wrest("w", 2, [CPU])
        assert not machine.cpu_is_free()
        machine.wrest("w", 1, [CPU])
        assert machine.cpu_is_free()


def test_a_slot_is_free_as_soon_as_its_worker_is_dead(home: Home) -> None:
    code = (
        "import sys, time; from pathlib import Path; from studio.disk import Home; "
        "from studio.domain.placement import Placement; from workers.slots import Slots; "
        "mine = Slots(Home(path=Path(sys.argv[1])), 'dead').take(Placement(fits=True), 1); "
        "print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(home.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    machine = Slots(home, "w")
    assert not machine.cpu_is_free()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while not machine.cpu_is_free():
        assert time.monotonic() < deadline
    with taken(machine):
        assert machine.holder_of(CPU) == "w 1"
