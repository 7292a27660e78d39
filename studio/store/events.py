"""What happened to Runs, Merges and Chats: appended to, never changed."""

import time
from collections.abc import Sequence
from typing import Protocol

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from studio.store.rows import EventRow, JobRow


class Told(Protocol):
    """An event that a process has written into a file."""

    @property
    def at(self) -> float:
        """Seconds since 1970."""

    @property
    def epoch(self) -> int:
        """Of the Lease that it happened under."""

    @property
    def kind(self) -> str:
        """One or two words."""

    @property
    def text(self) -> str:
        """A sentence for a person."""


def add(
    session: Session,
    table: type[JobRow],
    row_id: int,
    *,
    kind: str,
    text: str,
    epoch: int = 0,
    at: float | None = None,
) -> None:
    """Append one event.

    Args:
        session: A write transaction: one writer at a time gives numbers without gaps.
        table: Kind of row.
        row_id: Its number.
        kind: One or two words.
        text: A sentence for a person.
        epoch: Of the Lease under which it happened; 0 where there was none.
        at: Seconds since 1970; None is now.
    """
    job = table.__tablename__
    last = session.scalar(
        select(func.max(EventRow.seq)).where(EventRow.job == job, EventRow.job_id == row_id)
    )
    session.add(
        EventRow(
            job=job,
            job_id=row_id,
            seq=(last or 0) + 1,
            at=time.time() if at is None else at,
            epoch=epoch,
            kind=kind,
            text=text,
        )
    )
    session.flush()


def add_new(session: Session, table: type[JobRow], row_id: int, told: Sequence[Told]) -> None:
    """Append the events that are not there yet: a file of events may be read more than once."""
    if not told:
        return
    known = {(event.at, event.kind) for event in of(session, table, row_id)}
    for event in told:
        if (event.at, event.kind) not in known:
            add(
                session,
                table,
                row_id,
                kind=event.kind,
                text=event.text,
                epoch=event.epoch,
                at=event.at,
            )


def of(session: Session, table: type[JobRow], row_id: int) -> Sequence[EventRow]:
    """Return all events of one row, oldest first."""
    return session.scalars(
        select(EventRow)
        .where(EventRow.job == table.__tablename__, EventRow.job_id == row_id)
        .order_by(EventRow.seq)
    ).all()
