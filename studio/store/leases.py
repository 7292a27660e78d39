"""Claim, renew and end what workers execute: one set of queries for runs, merges and chats.

A claim is one BEGIN IMMEDIATE transaction that raises the row's epoch. Every later write names
(id, epoch, owner) and changes nothing when another worker has claimed since.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from studio.domain.run import LIVE, RunState, sources
from studio.store.rows import JobRow

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


def claim(
    session: Session, table: type[_Row], *, owner: str, now: float, max_live: int
) -> _Row | None:
    """Take the oldest queued row, unless `max_live` rows of its table are live already.

    Args:
        session: A write transaction.
        table: Kind of row.
        owner: Name of the worker.
        now: Seconds since 1970.
        max_live: Rows of this kind that may be executed at once.

    Returns:
        The row, now RUNNING with a new epoch; None when there is nothing to do.
    """
    live = session.scalar(select(func.count()).where(table.state.in_(LIVE)))
    if (live or 0) >= max_live:
        return None
    row = session.scalars(
        select(table).where(table.state == RunState.QUEUED).order_by(table.id).limit(1)
    ).first()
    if row is None:
        return None
    row.state = RunState.RUNNING
    row.epoch += 1
    row.owner = owner
    row.lease_until = now + LEASE_SECONDS
    row.started_at = now
    return row


def renew(session: Session, lease: Lease, *, now: float, values: dict[str, Any]) -> RunState | None:
    """Prolong a Lease and store what the process reported.

    Returns:
        The row's state, so that the worker learns of a wish to stop; None when the Lease is lost.
    """
    row = _held(session, lease)
    if row is None:
        return None
    row.lease_until = now + LEASE_SECONDS
    for name, value in values.items():
        setattr(row, name, value)
    return RunState(row.state)


def finish(
    session: Session, lease: Lease, state: RunState, *, now: float, values: dict[str, Any]
) -> bool:
    """End a row.

    Returns:
        Whether it was changed; False when the Lease is lost or the move is not allowed.
    """
    row = _held(session, lease)
    if row is None or RunState(row.state) not in sources(state):
        return False
    row.state = state
    row.finished_at = now
    row.lease_until = None
    for name, value in values.items():
        setattr(row, name, value)
    return True


def move(session: Session, table: type[_Row], row_id: int, state: RunState, *, now: float) -> bool:
    """Move a row that no worker needs to hold: the wish to stop, or a stop before the start.

    Returns:
        Whether it was changed; False when the row is not in a state that allows it.
    """
    values: dict[str, Any] = {"state": state}
    if state.is_final:
        values["finished_at"] = now
    changed = session.execute(
        update(table)
        .where(table.id == row_id, table.state.in_(list(sources(state))))
        .values(**values)
        .returning(table.id)
    )
    return changed.first() is not None


def expired(session: Session, table: type[_Row], *, now: float) -> Sequence[_Row]:
    """Return live rows whose Lease ran out."""
    return session.scalars(
        select(table).where(table.state.in_(LIVE), table.lease_until < now)
    ).all()


def queued(session: Session, table: type[_Row]) -> int:
    """Return how many rows wait."""
    count = select(func.count()).select_from(table).where(table.state == RunState.QUEUED)
    return session.scalar(count) or 0


def live(session: Session, table: type[_Row]) -> Sequence[_Row]:
    """Return the rows that a worker holds, oldest first."""
    return session.scalars(select(table).where(table.state.in_(LIVE)).order_by(table.id)).all()


def _held(session: Session, lease: Lease) -> JobRow | None:
    row = session.get(lease.table, lease.id)
    if row is None or row.epoch != lease.epoch or row.owner != lease.owner:
        return None
    return row if RunState(row.state) in LIVE else None
