"""Which Run was forked from which."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from studio.store.rows import RunRow


def parents(session: Session, row: RunRow) -> list[RunRow]:
    """Return the Run that one was forked from, then that one's, up to the first."""
    found: list[RunRow] = []
    while row.parent_id is not None and len(found) < 100:
        above = session.get(RunRow, row.parent_id)
        if above is None:
            break
        found.append(above)
        row = above
    return found


def children(session: Session, run_id: int) -> Sequence[RunRow]:
    """Return the Runs that were forked from one, oldest first."""
    return session.scalars(
        select(RunRow).where(RunRow.parent_id == run_id).order_by(RunRow.id)
    ).all()
