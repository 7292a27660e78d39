"""Queries of Datasets."""

from collections.abc import Sequence

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from studio.store.rows import DatasetRow


def by_sha256(session: Session, sha256: str) -> DatasetRow | None:
    """Return the Dataset of that content."""
    return session.scalars(select(DatasetRow).where(DatasetRow.sha256 == sha256)).first()


def find(session: Session, key: str) -> DatasetRow | None:
    """Return the Dataset of that name, number or content hash."""
    wanted = or_(DatasetRow.name == key, DatasetRow.sha256 == key)
    if key.isdecimal() and len(key) < 18:
        wanted = or_(wanted, DatasetRow.id == int(key))
    matches = session.scalars(select(DatasetRow).where(wanted)).all()
    # A name that looks like a number wins over the number.
    return min(matches, key=lambda row: row.name != key, default=None)


def names(session: Session) -> set[str]:
    """Return all names."""
    return set(session.scalars(select(DatasetRow.name)))


def listing(session: Session) -> Sequence[DatasetRow]:
    """Return all Datasets, newest first."""
    return session.scalars(select(DatasetRow).order_by(DatasetRow.id.desc())).all()
