"""Queries of Datasets and of the changes that wait for their next version."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    String,
    cast,
    delete,
    func,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import Session

from studio.store.dialects import each_number, insert
from studio.store.rows import DatasetRow, EditRow, RunRow


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


def runs_of(session: Session, row: DatasetRow) -> Sequence[int]:
    """Return the numbers of the Runs whose spec names a Dataset, in whatever part of it."""
    named = cast(RunRow.spec, String).contains(row.sha256)
    query = select(RunRow.id).where(or_(RunRow.dataset_id == row.id, named))
    return session.scalars(query.order_by(RunRow.id)).all()


def delete_row(session: Session, row: DatasetRow) -> None:
    """Delete a Dataset and what waits for its next version; its versions stay without a parent."""
    versions = update(DatasetRow).where(DatasetRow.parent_id == row.id)
    session.execute(versions.values(parent_id=None))
    session.execute(delete(EditRow).where(EditRow.dataset_id == row.id))
    session.execute(delete(DatasetRow).where(DatasetRow.id == row.id))


class Waiting(NamedTuple):
    """What waits for the next version of a Dataset.

    Attributes:
        excluded: Numbers of the records that are left out.
        changed: What changes of the others, by their number.
        newest: When the last of it was written.
    """

    excluded: frozenset[int]
    changed: dict[int, EditRow]
    newest: float


def waiting(session: Session, dataset_id: int) -> Waiting:
    """Return what waits for the next version."""
    mine = EditRow.dataset_id == dataset_id
    changed = select(EditRow).where(mine, EditRow.excluded.is_(False))
    newest = session.scalar(select(func.max(EditRow.updated_at)).where(mine))
    return Waiting(
        excluded=frozenset(numbers(session, dataset_id, EditRow.excluded.is_(True))),
        changed={row.number: row for row in session.scalars(changed)},
        newest=newest or 0.0,
    )


def numbers(session: Session, dataset_id: int, which: ColumnElement[bool]) -> Sequence[int]:
    """Return the numbers of the records whose EditRow is so, in their order."""
    query = select(EditRow.number).where(EditRow.dataset_id == dataset_id, which)
    return session.scalars(query.order_by(EditRow.number)).all()


def edit(session: Session, dataset_id: int, number: int) -> EditRow | None:
    """Return what waits for the next version of one record."""
    return session.get(EditRow, (dataset_id, number))


def put_edits(
    session: Session, dataset_id: int, numbers: Sequence[int], values: dict[str, Any], now: float
) -> None:
    """Store values for records; the other values of each stay, and what says nothing goes.

    Args:
        session: A write transaction.
        dataset_id: The Dataset.
        numbers: Its records.
        values: Columns of EditRow.
        now: Seconds since 1970; stored is a later moment than any before, whatever the clock does.
    """
    newest = session.scalar(
        select(func.max(EditRow.updated_at)).where(EditRow.dataset_id == dataset_id)
    )
    changed = {**values, "updated_at": max(now, (newest or 0.0) + 1e-6)}
    fresh = {"dataset_id": dataset_id, "excluded": False, "tags": None, "record": None, **changed}
    columns = {
        name: literal(value, EditRow.__table__.c[name].type) for name, value in fresh.items()
    }
    # All numbers are one value: half a million rows of their own would hold the database for long.
    each = each_number(session, numbers)
    chosen = each.add_columns(*columns.values()).where(true())  # true(): ON is no join
    statement = insert(session, EditRow).from_select(["number", *columns], chosen)
    session.execute(
        statement.on_conflict_do_update(index_elements=["dataset_id", "number"], set_=changed)
    )
    silent = (EditRow.excluded.is_(False), EditRow.tags.is_(None), EditRow.record.is_(None))
    mine = (EditRow.dataset_id == dataset_id, EditRow.number.in_(each))
    session.execute(delete(EditRow).where(*mine, *silent))


def drop_edits(session: Session, dataset_id: int) -> None:
    """Forget all that waits for the next version."""
    session.execute(delete(EditRow).where(EditRow.dataset_id == dataset_id))


def drop_saved_edits(session: Session, dataset_id: int, saved: Waiting) -> None:
    """Forget what a version has taken in, unless it was changed since."""
    is_saved = EditRow.updated_at <= saved.newest
    session.execute(delete(EditRow).where(EditRow.dataset_id == dataset_id, is_saved))
