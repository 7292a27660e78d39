"""Queries of chat processes."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from studio.domain.run import RunState
from studio.store.rows import ChatRow

USABLE = (RunState.QUEUED, RunState.RUNNING)


def usable(session: Session, run_id: int, artifact_id: int | None) -> ChatRow | None:
    """Return the chat process of that tuned model that serves or is about to."""
    return session.scalars(
        select(ChatRow)
        .where(
            ChatRow.run_id == run_id,
            ChatRow.artifact_id.is_(None)
            if artifact_id is None
            else ChatRow.artifact_id == artifact_id,
            ChatRow.state.in_(USABLE),
        )
        .order_by(ChatRow.id.desc())
    ).first()
