"""Queries of Runs and their Points."""

from collections.abc import Iterable, Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from studio.domain.metrics import Point
from studio.store.dialects import insert
from studio.store.rows import PointRow, RunRow


def listing(session: Session, limit: int) -> Sequence[RunRow]:
    """Return the newest Runs, newest first."""
    return session.scalars(select(RunRow).order_by(RunRow.id.desc()).limit(limit)).all()


def add_points(session: Session, run_id: int, points: Iterable[Point]) -> None:
    """Store Points; a step that is stored again replaces the old value."""
    rows = [
        {"run_id": run_id, "name": point.name, "step": point.step, "value": point.value}
        for point in points
    ]
    if not rows:
        return
    statement = insert(session, PointRow)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["run_id", "name", "step"],
            set_={"value": statement.excluded.value},
        ),
        rows,
    )


def forget_points(session: Session, run_id: int, after_step: int) -> None:
    """Remove the Points of steps that are taken again."""
    session.execute(delete(PointRow).where(PointRow.run_id == run_id, PointRow.step > after_step))


def curve(session: Session, run_id: int, name: str) -> list[Point]:
    """Return all Points of one Curve, in order of their steps."""
    rows = session.execute(
        select(PointRow.step, PointRow.value)
        .where(PointRow.run_id == run_id, PointRow.name == name)
        .order_by(PointRow.step)
    )
    return [Point(step=step, name=name, value=value) for step, value in rows]


def latest_values(session: Session, run_id: int, name: str, limit: int) -> list[float]:
    """Return the newest values of one Curve, newest first."""
    return list(
        session.scalars(
            select(PointRow.value)
            .where(PointRow.run_id == run_id, PointRow.name == name)
            .order_by(PointRow.step.desc())
            .limit(limit)
        )
    )
