"""Queries of Merges."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from studio.domain.run import RunState
from studio.store.rows import ArtifactRow


def listing(session: Session, limit: int) -> Sequence[ArtifactRow]:
    """Return the newest Merges, newest first."""
    return session.scalars(select(ArtifactRow).order_by(ArtifactRow.id.desc()).limit(limit)).all()


def of_run(session: Session, run_id: int) -> Sequence[ArtifactRow]:
    """Return the Merges of one Run, newest first."""
    return session.scalars(
        select(ArtifactRow).where(ArtifactRow.run_id == run_id).order_by(ArtifactRow.id.desc())
    ).all()


def finished(session: Session) -> Sequence[ArtifactRow]:
    """Return the Merges whose weights are ready, newest first."""
    return session.scalars(
        select(ArtifactRow)
        .where(ArtifactRow.state == RunState.FINISHED)
        .order_by(ArtifactRow.id.desc())
    ).all()
