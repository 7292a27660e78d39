"""Which cards a Run gets, and the words where it gets none."""

import pytest

from studio.domain.placement import Card, Need, place


def card(index: int, **values: object) -> Card:
    return Card.model_validate(
        {"uuid": f"GPU-{index}", "index": index, "name": "H100", "total_gib": 80.0, **values}
    )


def test_the_cpu_is_one_slot() -> None:
    assert place(Need(num_gpus=0), [], cpu_is_free=True).fits
    busy = place(Need(num_gpus=0), [card(0)], cpu_is_free=False)
    assert (busy.fits, busy.ever, busy.why) == (False, True, "another run uses the CPU")


def test_the_emptiest_cards_are_taken_and_those_with_too_little_memory_are_not() -> None:
    cards = [card(0, free_gib=10.0), card(1, free_gib=79.0), card(2, free_gib=60.0)]
    found = place(Need(num_gpus=2, gib=40.0), cards, cpu_is_free=False)
    assert [c.index for c in found.cards] == [1, 2]
    crowded = place(Need(num_gpus=3, gib=40.0), cards, cpu_is_free=True)
    assert (crowded.fits, crowded.ever) == (False, True)
    assert crowded.why == "it needs 3 GPUs with 40 GiB each, and 2 of 3 are free"


def test_a_card_that_tells_no_memory_is_believed_to_have_enough() -> None:
    assert place(Need(num_gpus=1, gib=40.0), [card(0, total_gib=None)], cpu_is_free=True).fits


@pytest.mark.parametrize(
    ("need", "cards", "why"),
    [
        (Need(num_gpus=1), [], "it needs 1 GPU, and this machine has none"),
        (
            Need(num_gpus=2, gib=100.0),
            [card(0), card(1)],
            "it needs 2 GPUs with 100 GiB each, and this machine has 2, the largest with 80 GiB",
        ),
        (
            Need(num_gpus=2),
            [card(0), card(1, fault="Xid 79")],
            "it needs 2 GPUs, and this machine has 2, the largest with 80 GiB, 1 out of order",
        ),
    ],
)
def test_what_never_fits_is_said_with_numbers(need: Need, cards: list[Card], why: str) -> None:
    found = place(need, cards, cpu_is_free=True)
    assert (found.fits, found.ever, found.why) == (False, False, why)


def test_a_taken_card_is_not_given_twice() -> None:
    found = place(Need(num_gpus=1), [card(0, is_taken=True)], cpu_is_free=True)
    assert (found.fits, found.why) == (False, "it needs 1 GPU, and 0 of 1 are free")
