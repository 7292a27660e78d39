"""The inventory of cards."""

import json
import shutil
import subprocess
import sys

import pytest

from workers.gpus import Gpu, inventory, parse

# nvidia-smi 580 with --format=csv,noheader,nounits on a machine with two cards.
TWO_CARDS = (
    "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 4\n1, GPU-bb, NVIDIA H100 80GB HBM3, 81559, 40960\n"
)


def test_cards_are_read_with_their_memory_in_gib() -> None:
    first, second = parse(TWO_CARDS)
    assert first == Gpu(
        index=0,
        uuid="GPU-aa",
        name="NVIDIA H100 80GB HBM3",
        total_gib=81559 / 1024,
        used_gib=4 / 1024,
    )
    assert (second.index, second.used_gib, second.free_gib) == (1, 40.0, 81559 / 1024 - 40.0)


def test_memory_that_the_driver_does_not_tell_is_unknown() -> None:
    (card,) = parse("0, GPU-cc, NVIDIA GB10, [N/A], [N/A]\n")
    assert (card.name, card.total_gib, card.free_gib) == ("NVIDIA GB10", None, None)


def test_a_card_that_has_fallen_off_the_bus_is_left_out() -> None:
    # What nvidia-smi 580 prints in the middle of the list, after an Xid 79.
    lost = "Unable to determine the device handle for GPU0000:41:00.0: Unknown Error\n"
    assert [card.index for card in parse(lost + TWO_CARDS)] == [0, 1]


def test_no_lines_are_no_cards() -> None:
    assert parse("") == []


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a driver")
def test_without_a_driver_there_are_no_cards() -> None:
    assert inventory() == []


def test_the_inventory_is_json_for_the_doctor() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "workers.gpus"], capture_output=True, text=True, check=True
    )
    assert len(json.loads(answer.stdout)) == len(inventory())
