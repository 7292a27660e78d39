"""The queue of Runs: which one is next, and who executes it."""

import time
from collections.abc import Callable, Sequence

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session, aliased

from studio.domain.placement import Need, Placement
from studio.domain.run import RunState
from studio.store import leases
from studio.store.clock import Holder
from studio.store.rows import QueueRow, RunRow

_ORDER = (RunRow.priority.desc(), RunRow.place, RunRow.id)


def add(session: Session, row: RunRow) -> None:
    """Put a new Run at the end of the queue."""
    session.add(row)
    session.flush()
    if row.place is None:
        row.place = _last_place(session) + 1.0


def to_the_end(session: Session, row: RunRow) -> None:
    """Give a Run that comes back the last place."""
    row.place = _last_place(session) + 1.0


def waiting(session: Session) -> Sequence[RunRow]:
    """Return all queued Runs in the order in which they start, those that are held among them."""
    is_queued = RunRow.state == RunState.QUEUED
    return session.scalars(select(RunRow).where(is_queued).order_by(*_ORDER)).all()


def ready(session: Session) -> Sequence[RunRow]:
    """Return the Runs that nothing but the want of a free machine keeps, in their order."""
    if is_paused(session):
        return []
    before = aliased(RunRow)
    is_ready = and_(
        RunRow.state == RunState.QUEUED,
        RunRow.is_held.is_(False),
        or_(RunRow.start_after.is_(None), RunRow.start_after <= time.time()),
        or_(
            RunRow.after_run_id.is_(None),
            select(before.id)
            .where(before.id == RunRow.after_run_id, before.state == RunState.FINISHED)
            .exists(),
        ),
    )
    return session.scalars(select(RunRow).where(is_ready).order_by(*_ORDER)).all()


def claim(
    session: Session, holder: Holder, place: Callable[[RunRow], Placement]
) -> tuple[RunRow, Placement] | None:
    """Take the first Run that fits a worker's machine now.

    A Run that fits the machine but not now keeps its place: no later one that wants the same kind
    of device overtakes it, or a Run for all cards would never start. One that never fits this
    machine is left to another worker.

    Args:
        session: A write transaction.
        holder: The worker.
        place: Tells whether a Run fits the worker's machine.

    Returns:
        The Run, now RUNNING with a new epoch, and where it was placed; None when there is nothing
        to do.
    """
    kept_for: set[bool] = set()
    for row in ready(session):
        is_gpu = row.num_gpus > 0
        if is_gpu in kept_for:
            continue
        found = place(row)
        if found.fits:
            leases.take(session, row, holder)
            row.gpus = [card.index for card in found.cards]
            row.saves_asked = row.evaluations_asked = 0
            return row, found
        if found.ever:
            kept_for.add(is_gpu)
    return None


def need_of(row: RunRow) -> Need:
    """Return what a Run needs."""
    return Need(num_gpus=row.num_gpus, gib=row.needs_gib)


def is_paused(session: Session) -> bool:
    """Tell whether no Run is started."""
    row = session.get(QueueRow, 1)
    return row is not None and row.is_paused


def pause(session: Session, paused: bool) -> None:
    """Start no Run, or start them again."""
    row = session.get(QueueRow, 1)
    if row is None:
        session.add(QueueRow(id=1, is_paused=paused))
    else:
        row.is_paused = paused


def _last_place(session: Session) -> float:
    last = select(func.max(RunRow.place)).where(RunRow.state == RunState.QUEUED)
    return session.scalar(last) or 0.0
