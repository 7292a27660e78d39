"""Claim, renew and end what workers execute: one set of queries for runs, merges and chats.

A claim is one write transaction that raises the row's epoch. Every later write names
(id, epoch, owner) and changes nothing when another worker has claimed since.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from studio.domain.retry import Attempts
from studio.domain.run import LIVE, RunState, Wish, sources
from studio.store import events
from studio.store.clock import Holder, is_of_one_machine, lease_now
from studio.store.rows import JobRow, RunRow

LEASE_SECONDS = 30.0

_Row = TypeVar("_Row", bound=JobRow)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """The right to execute one row, with its fencing number."""

    table: type[JobRow]
    id: int
    epoch: int
    owner: str

    @property
    def mark(self) -> str:
        """Value of STUDIO_RUN in the environment of every process that works under it.

        The owner's name is unique on the machine, so that two home folders never meet.
        """
        return f"{self.table.__tablename__}:{self.id}:{self.epoch}:{self.owner}"


def lease_of(row: JobRow) -> Lease:
    """Return the Lease under which a row is, or was last, held."""
    return Lease(table=type(row), id=row.id, epoch=row.epoch, owner=str(row.owner))


def claim(session: Session, table: type[_Row], *, holder: Holder, max_live: int) -> _Row | None:
    """Take the oldest queued Merge or Chat; Runs have an order and needs: see studio.store.queue.

    Args:
        session: A write transaction.
        table: Kind of row.
        holder: The worker.
        max_live: Rows of this kind that this worker may execute at once.

    Returns:
        The row, now RUNNING with a new epoch; None when there is nothing to do.
    """
    held = select(func.count()).where(table.state.in_(LIVE), table.owner == holder.name)
    if (session.scalar(held) or 0) >= max_live:
        return None
    row = session.scalars(
        select(table).where(table.state == RunState.QUEUED).order_by(table.id).limit(1)
    ).first()
    if row is not None:
        take(session, row, holder)
    return row


def take(session: Session, row: JobRow, holder: Holder) -> None:
    """Give a queued row to a worker."""
    row.state = RunState.RUNNING
    row.epoch += 1
    row.owner, row.host, row.boot_id = holder.name, holder.host, holder.boot_id
    row.lease_until = lease_now(session) + LEASE_SECONDS
    row.started_at = time.time()
    row.wish, row.stage, row.error = Wish.NONE, "", None


def renew(session: Session, lease: Lease, values: dict[str, Any]) -> RunState | None:
    """Prolong a Lease and store what the process reported.

    Returns:
        The row's state, so that the worker learns of a wish to stop; None when the Lease is lost.
    """
    row = _held(session, lease)
    if row is None:
        return None
    row.lease_until = lease_now(session) + LEASE_SECONDS
    for name, value in values.items():
        setattr(row, name, value)
    return RunState(row.state)


def finish(session: Session, lease: Lease, state: RunState, values: dict[str, Any]) -> bool:
    """End a row.

    Returns:
        Whether it was changed; False when the Lease is lost or the move is not allowed.
    """
    row = _held(session, lease)
    if row is None or RunState(row.state) not in sources(state):
        return False
    row.state = state
    row.finished_at = time.time()
    _let_go(row)
    for name, value in values.items():
        setattr(row, name, value)
    return True


def requeue(
    session: Session,
    lease: Lease,
    *,
    attempts: Attempts | None = None,
    is_held: bool = False,
) -> bool:
    """Put a live row back into the queue, at its old place: after a fault, or for a pause.

    Args:
        session: A write transaction.
        lease: The Lease that ends.
        attempts: How often it was tried, to be kept; None where it was not the work that failed.
        is_held: Whether it waits there until somebody lets it go on; Runs only.

    Returns:
        Whether it was changed; False when the Lease is lost.
    """
    row = _held(session, lease)
    if row is None:
        return False
    row.state = RunState.QUEUED
    row.stage = ""
    _let_go(row)
    if attempts is not None:
        row.crashes, row.losses, row.furthest = (
            attempts.crashes,
            attempts.losses,
            attempts.furthest,
        )
    if isinstance(row, RunRow):
        row.is_held = is_held
    return True


def attempts_of(row: JobRow) -> Attempts:
    """Return how often a row was tried."""
    return Attempts(crashes=row.crashes, losses=row.losses, furthest=row.furthest)


def move(session: Session, table: type[_Row], row_id: int, state: RunState) -> bool:
    """Move a row that no worker needs to hold: the wish to stop, or a stop before the start.

    Returns:
        Whether it was changed; False when the row is not in a state that allows it.
    """
    values: dict[str, Any] = {"state": state}
    if state.is_final:
        values["finished_at"] = time.time()
    # What a worker holds goes back into the queue by `requeue` alone.
    allowed = sources(state) - LIVE if state is RunState.QUEUED else sources(state)
    changed = session.execute(
        update(table)
        .where(table.id == row_id, table.state.in_(list(allowed)))
        .values(**values)
        .returning(table.id)
    )
    return changed.first() is not None


def expired(session: Session, table: type[_Row], boot_id: str) -> Sequence[_Row]:
    """Return live rows whose Lease ran out, or was of the time before the machine was restarted."""
    now = lease_now(session)
    # A Lease that ends later than any Lease can is of a clock that was set back.
    is_over = (table.lease_until < now) | (table.lease_until > now + 2 * LEASE_SECONDS)
    if is_of_one_machine(session):
        is_over |= table.boot_id.is_distinct_from(boot_id)
    return session.scalars(select(table).where(table.state.in_(LIVE), is_over)).all()


def queued(session: Session, table: type[_Row]) -> int:
    """Return how many rows wait."""
    count = select(func.count()).select_from(table).where(table.state == RunState.QUEUED)
    return session.scalar(count) or 0


def live(session: Session, table: type[_Row]) -> Sequence[_Row]:
    """Return the rows that a worker holds, oldest first."""
    return session.scalars(select(table).where(table.state.in_(LIVE)).order_by(table.id)).all()


def note(session: Session, lease: Lease, kind: str, text: str) -> None:
    """Write into the history of a row what happened under a Lease."""
    events.add(session, lease.table, lease.id, kind=kind, text=text, epoch=lease.epoch)


def _let_go(row: JobRow) -> None:
    row.lease_until, row.wish = None, Wish.NONE
    if isinstance(row, RunRow):
        row.gpus = None


def _held(session: Session, lease: Lease) -> JobRow | None:
    row = session.get(lease.table, lease.id)
    if row is None or row.epoch != lease.epoch or row.owner != lease.owner:
        return None
    return row if RunState(row.state) in LIVE else None
