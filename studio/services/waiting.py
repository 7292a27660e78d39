"""Why each queued Run waits, and what the workers do: told by the rules that workers claim by."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from studio.domain.moment import moment_words
from studio.domain.placement import Card, place
from studio.domain.run import RunState
from studio.services.studio import Studio
from studio.store import leases, queue, workers
from studio.store.rows import ArtifactRow, ChatRow, JobRow, RunRow, WorkerRow

PAUSED = "paused by you"
ALL_PAUSED = "the queue is paused"
NO_WORKER = "no worker is alive"
NEXT = "Next: starts as soon as a worker is free"
_OVER = {RunState.FAILED: "which failed", RunState.STOPPED: "which was stopped"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A queued Run.

    Attributes:
        why: What it waits for now.
    """

    row: RunRow
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A worker that lives.

    Attributes:
        cards: Its GPUs; empty where it has only a CPU.
        works: What it executes, a few words each.
        is_closing: Whether it takes no more work.
    """

    name: str
    host: str
    version: str
    cards: tuple[Card, ...]
    works: tuple[str, ...]
    is_closing: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """The queue as a whole, in the order in which Runs start."""

    is_paused: bool
    waiting: tuple[Waiting, ...]
    machines: tuple[Machine, ...]


def overview(studio: Studio) -> Overview:
    """Return every queued Run with what it waits for, and what the workers do."""
    with studio.database.read() as session:
        alive = workers.alive(session)
        is_paused = queue.is_paused(session)
        room = _Room.of(session, alive)
        waiting = tuple(
            Waiting(row=row, why=_why(session, row, room, is_paused))
            for row in queue.waiting(session)
        )
        machines = tuple(_machine(session, row) for row in alive)
    return Overview(is_paused=is_paused, waiting=waiting, machines=machines)


def why(studio: Studio, run_id: int) -> str:
    """Return what a queued Run waits for; empty when it is not queued."""
    found = [one.why for one in overview(studio).waiting if one.row.id == run_id]
    return found[0] if found else ""


def _why(session: Session, row: RunRow, room: "_Room", is_paused: bool) -> str:
    if row.is_held:
        return PAUSED
    before = None if row.after_run_id is None else session.get(RunRow, row.after_run_id)
    if before is not None and before.state != RunState.FINISHED:
        return _waits_for(before)
    if row.start_after is not None and row.start_after > time.time():
        return f"starts at {moment_words(row.start_after)}"
    return ALL_PAUSED if is_paused else room.why(row)


def _waits_for(before: RunRow) -> str:
    over = _OVER.get(RunState(before.state))
    if over is not None:
        return f"waits for run {before.id}, {over}: choose Start without it, or stop this run"
    state = "paused" if before.state == RunState.QUEUED and before.is_held else before.state.lower()
    return f"waits for run {before.id} ({state})"


@dataclass(slots=True)
class _Place:
    """What is free on one machine, and what the Runs before would take of it."""

    cards: list[Card]
    cpu_is_free: bool


@dataclass(slots=True)
class _Room:
    """What is free on all machines, as Run after Run is placed there.

    Attributes:
        first: Of GPUs (True) or CPUs (False): the Run that keeps all later ones waiting.
    """

    places: list[_Place]
    first: dict[bool, int] = field(default_factory=dict)

    @classmethod
    def of(cls, session: Session, alive: Sequence[WorkerRow]) -> "_Room":
        """Look at what the workers say of themselves."""
        live = leases.live(session, RunRow)
        busy = {row.host for row in live if row.num_gpus == 0}
        taken = {(row.host, index) for row in live for index in row.gpus or ()}
        places = [
            _Place(
                cards=[
                    card.model_copy(
                        update={"is_taken": card.is_taken or (row.host, card.index) in taken}
                    )
                    for card in _cards(row)
                ],
                cpu_is_free=row.host not in busy,
            )
            for row in alive
            if not row.is_closing
        ]
        return cls(places=places)

    def why(self, row: RunRow) -> str:
        """Return why a Run that is ready waits, and take its place from those behind it."""
        if not self.places:
            return NO_WORKER
        is_gpu = row.num_gpus > 0
        need = queue.need_of(row)
        found = [place(need, one.cards, cpu_is_free=one.cpu_is_free) for one in self.places]
        able = [one for one in found if one.ever]
        if not able:
            return f"{found[0].why.split(', and ')[0]}, and no worker has them"
        if is_gpu in self.first:
            return f"its turn comes after run {self.first[is_gpu]}"
        for there, one in zip(self.places, found, strict=True):
            if one.fits:
                chosen = {card.index for card in one.cards}
                there.cpu_is_free &= is_gpu
                there.cards = [
                    card.model_copy(update={"is_taken": card.is_taken or card.index in chosen})
                    for card in there.cards
                ]
                return NEXT
        self.first[is_gpu] = row.id
        return able[0].why if is_gpu else NEXT


def _cards(row: WorkerRow) -> tuple[Card, ...]:
    return tuple(Card.model_validate(card) for card in row.cards)


def _machine(session: Session, row: WorkerRow) -> Machine:
    def of(table: type[JobRow]) -> list[JobRow]:
        return [job for job in leases.live(session, table) if job.owner == row.name]

    works = [
        *(f"trains run {job.id}" for job in of(RunRow)),
        *(f"merges {job.id}" for job in of(ArtifactRow)),
        *(f"chat {job.id}" for job in of(ChatRow)),
    ]
    return Machine(
        name=row.name,
        host=row.host,
        version=row.version,
        cards=_cards(row),
        works=tuple(works),
        is_closing=row.is_closing,
    )
