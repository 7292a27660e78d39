"""Workers as they describe themselves while they live."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from studio.store.clock import boot_id, is_of_one_machine, lease_now
from studio.store.leases import LEASE_SECONDS
from studio.store.rows import WorkerRow


def report(session: Session, row: WorkerRow) -> None:
    """Store what a worker says of itself; it is believed as long as a Lease."""
    row.seen_until = lease_now(session) + LEASE_SECONDS
    session.merge(row)


def leave(session: Session, name: str) -> None:
    """Forget a worker that ends."""
    session.execute(delete(WorkerRow).where(WorkerRow.name == name))


def forget_dead(session: Session, keep_seconds: float = 600.0) -> None:
    """Forget the workers that have not been seen for long, or since the machine was restarted."""
    is_dead: Any = WorkerRow.seen_until < lease_now(session) - keep_seconds
    if is_of_one_machine(session):
        is_dead |= WorkerRow.boot_id != boot_id()
    session.execute(delete(WorkerRow).where(is_dead))


def alive(session: Session) -> Sequence[WorkerRow]:
    """Return the workers that are believed to live, oldest first."""
    is_alive: Any = WorkerRow.seen_until >= lease_now(session)
    if is_of_one_machine(session):
        is_alive &= WorkerRow.boot_id == boot_id()
    return session.scalars(
        select(WorkerRow).where(is_alive).order_by(WorkerRow.started_at, WorkerRow.name)
    ).all()
