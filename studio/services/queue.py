"""Verbs of the queue: order, priority, hold, start later or behind another Run, pause it all."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sqlalchemy.orm import Session

from studio.dispatch import Bell
from studio.domain.moment import check_moment, moment_words
from studio.domain.run import RunState
from studio.errors import ConflictError, InputError, NotFoundError
from studio.services.studio import Studio
from studio.store import events, leases
from studio.store import queue as store
from studio.store.rows import RunRow

MAX_QUEUED = 1000
MAX_PRIORITY = 100
# Places of neighbours are halved until they are this near; then all are numbered anew.
_LEAST_GAP = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """How a Run waits.

    Attributes:
        priority: -100 to 100; the higher one starts first.
        start_after: Moment before which it does not start, in seconds since 1970.
        after_run_id: Run that must have finished before it starts.
        is_held: Whether it waits until somebody lets it go on.
    """

    priority: int = 0
    start_after: float | None = None
    after_run_id: int | None = None
    is_held: bool = False


def enter(session: Session, row: RunRow, order: Order) -> None:
    """Put a new Run at the end of the queue.

    Raises:
        ConflictError: The queue is full.
        NotFoundError: There is no Run that it shall wait for.
        InputError: The priority is out of range or the moment in the past.
    """
    if leases.queued(session, RunRow) >= MAX_QUEUED:
        raise _full()
    _check_priority(order.priority)
    if order.start_after is not None:
        check_moment(order.start_after)
    if order.after_run_id is not None:
        _get(session, order.after_run_id)
    row.priority, row.is_held = order.priority, order.is_held
    row.start_after, row.after_run_id = order.start_after, order.after_run_id
    store.add(session, row)


def reenter(session: Session, row: RunRow) -> None:
    """Give a Run that was queued anew the last place.

    Raises:
        ConflictError: The queue is full.
    """
    if leases.queued(session, RunRow) > MAX_QUEUED:
        raise _full()
    store.to_the_end(session, row)


def no_run(run_id: int) -> NotFoundError:
    """Return the words for a Run that does not exist."""
    return NotFoundError(f"There is no run {run_id}.", "`studio runs` lists all runs.")


def pause(studio: Studio, paused: bool) -> None:
    """Start no Run, or start them again; what runs goes on."""
    with studio.database.write() as session:
        store.pause(session, paused)
    if not paused:
        studio.dispatch.ring(Bell.TRAIN)


def hold(studio: Studio, run_id: int) -> RunRow:
    """Keep a queued Run from starting.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is not queued, or it is paused already.
    """
    with studio.database.write() as session:
        row = _queued(session, run_id)
        if row.is_held:
            raise ConflictError(f"Run {run_id} is paused already.", "Resume lets it go on.")
        row.is_held = True
        events.add(session, RunRow, run_id, kind="paused", text="You paused it in the queue.")
    return row


def release(studio: Studio, run_id: int) -> RunRow:
    """Let a paused Run go on; it starts when it is its turn.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is not queued, or it is not paused.
    """
    with studio.database.write() as session:
        row = _queued(session, run_id)
        if not row.is_held:
            raise ConflictError(f"Run {run_id} is not paused.", "It starts when it is its turn.")
        row.is_held = False
        events.add(session, RunRow, run_id, kind="resumed", text="You let it go on.")
    studio.dispatch.ring(Bell.TRAIN)
    return row


def move_first(studio: Studio, run_id: int) -> RunRow:
    """Put a Run before all others that wait; where needed it takes their priority.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is not queued.
    """
    with studio.database.write() as session:
        row = _queued(session, run_id)
        _put(row, _others(session, run_id), 0)
    studio.dispatch.ring(Bell.TRAIN)
    return row


def move_up(studio: Studio, run_id: int) -> RunRow:
    """Let a Run change places with the one before it.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is not queued.
    """
    return _step(studio, run_id, -1)


def move_down(studio: Studio, run_id: int) -> RunRow:
    """Let a Run change places with the one behind it.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is not queued.
    """
    return _step(studio, run_id, 1)


def move_before(studio: Studio, run_id: int, other_id: int) -> RunRow:
    """Put a Run right before another one.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: One of them is not queued.
        InputError: Both are the same.
    """
    if run_id == other_id:
        raise InputError(f"Run {run_id} cannot stand before itself.", "Name another queued run.")
    with studio.database.write() as session:
        _queued(session, other_id)
        row = _queued(session, run_id)
        others = _others(session, run_id)
        _put(row, others, [other.id for other in others].index(other_id))
    studio.dispatch.ring(Bell.TRAIN)
    return row


def set_priority(studio: Studio, run_id: int, priority: int) -> RunRow:
    """Give a Run a priority; those of a higher one start first.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is not queued.
        InputError: The priority is out of range.
    """
    _check_priority(priority)
    with studio.database.write() as session:
        row = _queued(session, run_id)
        row.priority = priority
    studio.dispatch.ring(Bell.TRAIN)
    return row


def start_after(studio: Studio, run_id: int, moment: float | None) -> RunRow:
    """Let a Run start no earlier than a moment; None takes that back.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is not queued.
        InputError: The moment is in the past.
    """
    if moment is not None:
        check_moment(moment)
    with studio.database.write() as session:
        row = _queued(session, run_id)
        row.start_after = moment
        if moment is not None:
            text = f"You let it start no earlier than {moment_words(moment)}."
            events.add(session, RunRow, run_id, kind="start after", text=text)
    studio.dispatch.ring(Bell.TRAIN)
    return row


def wait_for(studio: Studio, run_id: int, other_id: int | None) -> RunRow:
    """Let a Run start only when another one has finished; None takes that back.

    Raises:
        NotFoundError: There is no such Run.
        ConflictError: It is not queued.
        InputError: It would wait for itself, by itself or in a circle.
    """
    with studio.database.write() as session:
        row = _queued(session, run_id)
        if other_id is not None:
            _check_circle(session, run_id, other_id)
        row.after_run_id = other_id
    studio.dispatch.ring(Bell.TRAIN)
    return row


def _full() -> ConflictError:
    return ConflictError(
        f"{MAX_QUEUED:,} runs are queued, and the queue holds no more.",
        "Wait until some have started, or stop some of them.",
    )


def _check_priority(priority: int) -> None:
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InputError(
            f"The priority {priority} is out of range.",
            f"Give a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}; 0 is usual.",
            field="priority",
        )


def _check_circle(session: Session, run_id: int, other_id: int) -> None:
    if other_id == run_id:
        raise InputError(f"Run {run_id} cannot wait for itself.", "Name another run.")
    chain, there = [other_id], _get(session, other_id).after_run_id
    while there is not None and there not in chain:
        chain.append(there)
        if there == run_id:
            words = ", which waits for ".join(f"run {number}" for number in chain)
            raise InputError(
                f"Run {run_id} would wait for {words}: none of them would ever start.",
                "Let one of them wait for nothing first.",
            )
        there = _get(session, there).after_run_id


def _get(session: Session, run_id: int) -> RunRow:
    row = session.get(RunRow, run_id)
    if row is None:
        raise no_run(run_id)
    return row


def _queued(session: Session, run_id: int) -> RunRow:
    row = _get(session, run_id)
    if row.state != RunState.QUEUED:
        raise ConflictError(
            f"Run {run_id} is {row.state}.", "Only a queued run has a place in the queue."
        )
    return row


def _others(session: Session, run_id: int) -> list[RunRow]:
    return [row for row in store.waiting(session) if row.id != run_id]


def _step(studio: Studio, run_id: int, by: int) -> RunRow:
    with studio.database.write() as session:
        row = _queued(session, run_id)
        place = [other.id for other in store.waiting(session)].index(run_id)
        others = _others(session, run_id)
        if 0 <= place + by <= len(others):
            _put(row, others, place + by)
    studio.dispatch.ring(Bell.TRAIN)
    return row


def _put(row: RunRow, others: Sequence[RunRow], index: int) -> None:
    """Give a Run the place between two neighbours, and a priority that lets it stand there."""
    above = others[index - 1] if index else None
    below = others[index] if index < len(others) else None
    if below is not None:
        row.priority = max(row.priority, below.priority)
    if above is not None:
        row.priority = min(row.priority, above.priority)
    peers = [other for other in others if other.priority == row.priority]
    places = [other.place for other in peers]
    near = any(
        one is None or two is None or two - one < _LEAST_GAP for one, two in pairwise(places)
    )
    if near or None in places:
        for number, peer in enumerate(peers, start=1):
            peer.place = float(number)
    low = above.place if above in peers and above is not None else None
    high = below.place if below in peers and below is not None else None
    row.place = _between(low, high)


def _between(low: float | None, high: float | None) -> float:
    if low is None and high is None:
        return 0.0
    if low is None or high is None:
        return high - 1.0 if high is not None else (low or 0.0) + 1.0
    return (low + high) / 2
