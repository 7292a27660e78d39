"""Where a Run may be executed: how many cards it needs, and how much memory on each."""

from collections.abc import Sequence
from dataclasses import dataclass

from studio.domain.section import Section


class Card(Section):
    """One GPU of a worker's machine.

    Attributes:
        uuid: Name that the driver gives it, the same in every container of a machine.
        index: Its number as CUDA counts them.
        free_gib: Memory that nobody uses; None where the driver does not tell.
        is_taken: Whether a Run holds it.
        fault: Why it takes no Run; empty where nothing is wrong.
    """

    uuid: str
    index: int
    name: str
    total_gib: float | None = None
    free_gib: float | None = None
    is_taken: bool = False
    fault: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a Run needs.

    Attributes:
        num_gpus: Cards on one machine; 0 is the CPU.
        gib: Memory on each card; None where it is not known.
    """

    num_gpus: int
    gib: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Whether a Run fits a machine.

    Attributes:
        cards: The cards that it gets; empty for the CPU, and where it does not fit now.
        fits: Whether it can start now.
        ever: Whether it can start when nobody else is there.
        why: Why it cannot start now; empty where it can.
    """

    cards: tuple[Card, ...] = ()
    fits: bool
    ever: bool = True
    why: str = ""


def place(need: Need, cards: Sequence[Card], *, cpu_is_free: bool) -> Placement:
    """Choose the cards of a Run: free ones with enough memory, those with the most free first.

    Args:
        need: What it needs.
        cards: All cards of the machine.
        cpu_is_free: Whether no other Run uses the CPU: it has one slot.
    """
    if need.num_gpus == 0:
        why = "" if cpu_is_free else "another run uses the CPU"
        return Placement(fits=cpu_is_free, why=why)
    able = [card for card in cards if not card.fault and _holds(card.total_gib, need.gib)]
    if len(able) < need.num_gpus:
        return Placement(fits=False, ever=False, why=_never(need, cards))
    free = [card for card in able if not card.is_taken and _holds(card.free_gib, need.gib)]
    if len(free) < need.num_gpus:
        are = "is" if len(free) == 1 else "are"
        now = f"{len(free)} of {len(cards)} {are} free"
        return Placement(fits=False, why=f"it needs {_cards(need)}, and {now}")
    free.sort(key=lambda card: (-(card.free_gib or 0.0), card.index))
    return Placement(fits=True, cards=tuple(free[: need.num_gpus]))


def _holds(there: float | None, needed: float | None) -> bool:
    return there is None or needed is None or there >= needed


def _cards(need: Need) -> str:
    count = "1 GPU" if need.num_gpus == 1 else f"{need.num_gpus} GPUs"
    return count if need.gib is None else f"{count} with {need.gib:.0f} GiB each"


def _never(need: Need, cards: Sequence[Card]) -> str:
    if not cards:
        return f"it needs {_cards(need)}, and this machine has none"
    largest = max((card.total_gib or 0.0) for card in cards)
    there = f"{len(cards)}, the largest with {largest:.0f} GiB" if largest else f"{len(cards)}"
    faulty = sum(1 for card in cards if card.fault)
    there += f", {faulty} out of order" if faulty else ""
    return f"it needs {_cards(need)}, and this machine has {there}"
