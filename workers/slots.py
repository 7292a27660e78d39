"""Who works on which card of this machine: lock files that the kernel frees with their holder.

A worker that executes a Run holds NAME.lock of each of its cards; every rank of the Run holds
NAME.ranks, in common. So a card is free for the next Run only when the last rank on it is dead,
whatever became of the worker that had started it. The CPU is one slot.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Self

from studio.disk import Home
from studio.domain.placement import Card, Placement
from studio.errors import MachineError, disk_errors
from studio.locks import is_locked, take_lock_soon
from studio.store.clock import boot_id
from workers import gpus

logger = logging.getLogger(__name__)

CPU = "cpu"
FREE_SECONDS = 60.0
# After a run its cards are as free as before, but for what drivers keep for themselves.
MEMORY_SECONDS = 10.0
MEMORY_GIB = 1.0
_LOOK_SECONDS = 0.1


class SlotError(MachineError):
    """Processes of an earlier Run do not leave a slot."""


class GivenUpError(Exception):
    """The Run or its worker shall end, so that nobody waits for the slots any more."""


def _never() -> bool:
    return False


@dataclass(kw_only=True, slots=True)
class Taken:
    """The slots of one Run; they are free again when this is closed or the process ends.

    Attributes:
        is_given_up: Asked, while earlier Runs are waited for, whether nobody waits any more.
    """

    cards: tuple[Card, ...]
    folder: Path
    locks: list[TextIOWrapper]
    is_given_up: Callable[[], bool] = _never

    @property
    def names(self) -> tuple[str, ...]:
        """The cards by the driver's names, or the CPU."""
        return tuple(card.uuid for card in self.cards) or (CPU,)

    @property
    def ranks(self) -> list[Path]:
        """The lock files that every rank holds."""
        return [self.folder / f"{name}.ranks" for name in self.names]

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free the slots."""
        self.close()

    def close(self) -> None:
        """Free the slots."""
        for lock in self.locks:
            lock.close()

    def prove_free(self) -> None:
        """Wait until no rank of any earlier Run is left on these slots.

        Raises:
            SlotError: Some are there after a minute.
            GivenUpError: Nobody waits for them any more.
        """
        deadline = time.monotonic() + FREE_SECONDS
        for path in self.ranks:
            while is_locked(path):
                if self.is_given_up():
                    raise GivenUpError
                if time.monotonic() > deadline:
                    raise SlotError(
                        f"Processes of an earlier run still use {path.stem}, and do not end.",
                        "End them by hand; `nvidia-smi` lists those on a card.",
                    )
                time.sleep(_LOOK_SECONDS)

    def kept_back(self) -> str:
        """Say in a sentence what memory did not come back after the Run; empty when all did.

        The driver takes a moment to free the memory of a process that has ended.
        """
        deadline = time.monotonic() + MEMORY_SECONDS
        while (missing := self._missing()) and time.monotonic() < deadline:
            time.sleep(1.0)
        if not missing:
            return ""
        cards = ", ".join(f"{gib:.0f} GiB on GPU {card.index}" for card, gib in missing)
        return f"Memory that was free before the run is not free after it: {cards}."

    def _missing(self) -> list[tuple[Card, float]]:
        if not self.cards:
            return []
        free = {card.uuid: card.free_gib for card in gpus.inventory()}
        lost = [
            (card, (card.free_gib or 0.0) - (free.get(card.uuid) or 0.0)) for card in self.cards
        ]
        return [(card, gib) for card, gib in lost if gib > MEMORY_GIB]


class Slots:
    """The slots of this machine, for one home folder.

    Args:
        home: The home folder; its workers share the lock files.
        owner: Name of this worker, written into the files that it locks.
    """

    def __init__(self, home: Home, owner: str) -> None:
        self._folder = home.slots(boot_id())
        self._owner = owner

    def cards(self) -> list[Card]:
        """Return the cards of this machine, and which of them are taken."""
        return [
            Card(
                uuid=card.uuid,
                index=card.index,
                name=card.name,
                total_gib=card.total_gib,
                free_gib=card.free_gib,
                is_taken=self._is_taken(card.uuid),
            )
            for card in gpus.inventory()
        ]

    def cpu_is_free(self) -> bool:
        """Tell whether no Run uses the CPU."""
        return not self._is_taken(CPU)

    def take(self, placement: Placement, run_id: int) -> Taken | None:
        """Lock the slots of a placement.

        Args:
            placement: Where the Run fits.
            run_id: The Run, written into the files together with this worker.

        Returns:
            The locks; None when another worker was faster.
        """
        names = tuple(card.uuid for card in placement.cards) or (CPU,)
        with disk_errors("taking a slot"):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        locks: list[TextIOWrapper] = []
        for name in names:
            lock = take_lock_soon(self._folder / f"{name}.lock")
            if lock is None:
                _close(locks)
                return None
            locks.append(lock)
            lock.seek(0)
            lock.truncate(0)
            lock.write(f"{self._owner} {run_id}\n")
            lock.flush()
        return Taken(cards=placement.cards, folder=self._folder, locks=locks)

    def names(self, indices: Sequence[int]) -> list[str]:
        """Return the names of the slots of a Run by the numbers of its cards; none is the CPU."""
        if not indices:
            return [CPU]
        return [card.uuid for card in gpus.inventory() if card.index in indices]

    def wrest(self, owner: str, run_id: int, names: Sequence[str]) -> None:
        """Free the slots of a Run whose worker lives and yet stands still.

        Its locks are on files that have no name any more. As slots are taken in a transaction that
        writes, this has to be called in one, too: then nobody takes one of them at this moment.

        Args:
            owner: The worker; what another one has taken meanwhile stays.
            run_id: The Run; what the worker has taken for another one stays, too.
            names: Of the slots.
        """
        for name in names:
            path = self._folder / f"{name}.lock"
            if self.holder_of(name) == f"{owner} {run_id}" and is_locked(path):
                path.unlink(missing_ok=True)

    def holder_of(self, name: str) -> str:
        """Return the worker that holds a slot and the number of its Run, as far as it is known."""
        path = self._folder / f"{name}.lock"
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def _is_taken(self, name: str) -> bool:
        # Also while ranks are there that nobody could end: no Run is sent to wait for them.
        paths = (self._folder / f"{name}.{kind}" for kind in ("lock", "ranks"))
        return any(path.exists() and is_locked(path) for path in paths)


def _close(locks: Sequence[TextIOWrapper]) -> None:
    for lock in locks:
        lock.close()
