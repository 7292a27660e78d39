"""Queries of Datasets and of what waits for their next version."""

import time
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from studio.store import datasets
from studio.store.database import Database
from studio.store.rows import DatasetRow, EditRow, RunRow


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """A database with two Datasets."""
    made = Database(tmp_path / "studio.db")
    with made.write() as session:
        for name in ("one", "two"):
            session.add(
                DatasetRow(
                    name=name,
                    sha256=name * 20,
                    source_name=name,
                    num_conversations=9,
                    size_bytes=1,
                    report={},
                    created_at=1.0,
                )
            )
    return made


def put(database: Database, numbers: list[int], now: float = 1.0, **values: object) -> None:
    with database.write() as session:
        datasets.put_edits(session, 1, numbers, values, now)


def marks(database: Database) -> list[tuple[int, bool, bool, bool]]:
    with database.read() as session:
        rows = session.scalars(select(EditRow).order_by(EditRow.number)).all()
    return [
        (row.number, row.excluded, row.record is not None, row.tags is not None) for row in rows
    ]


def test_what_is_written_of_a_record_leaves_the_rest_of_it(database: Database) -> None:
    put(database, [3, 1], excluded=True)
    put(database, [3], tags=["a"])
    put(database, [3], record="{}")
    assert marks(database) == [(1, True, False, False), (3, True, True, True)]
    put(database, [3], excluded=False)
    put(database, [3], tags=None)
    assert marks(database) == [(1, True, False, False), (3, False, True, False)]


def test_a_change_that_says_nothing_is_no_row(database: Database) -> None:
    put(database, [1], excluded=False)
    put(database, [2], tags=["a"])
    put(database, [2], tags=None)
    put(database, [])
    assert marks(database) == []


def test_no_tags_and_an_empty_list_of_tags_are_two_things(database: Database) -> None:
    put(database, [1], tags=[])
    with database.read() as session:
        row = datasets.edit(session, 1, 1)
    assert row is not None
    assert row.tags == []


def test_many_records_are_written_at_once(database: Database) -> None:
    began = time.monotonic()
    put(database, list(range(300_000)), excluded=True)
    put(database, list(range(300_000)), 2.0, excluded=False)
    assert time.monotonic() - began < 20  # other writers wait as long
    assert marks(database) == []


def test_a_later_change_is_later_whatever_the_clock_says(database: Database) -> None:
    put(database, [1], 5.0, excluded=True)
    with database.read() as session:
        saved = datasets.waiting(session, 1)
    put(database, [1], 3.0, tags=["a"])
    with database.write() as session:
        datasets.drop_saved_edits(session, 1, saved)
    assert marks(database) == [(1, True, False, True)]


def test_only_what_was_saved_is_dropped(database: Database) -> None:
    put(database, [1, 2], excluded=True)
    with database.read() as session:
        saved = datasets.waiting(session, 1)
    assert saved == datasets.Waiting(excluded=frozenset({1, 2}), changed={}, newest=1.0)
    put(database, [2], 2.0, excluded=True)
    put(database, [3], excluded=True)
    with database.write() as session:
        datasets.drop_saved_edits(session, 1, saved)
    assert [number for number, *_ in marks(database)] == [2, 3]


def test_runs_are_found_by_row_and_by_what_their_spec_names(database: Database) -> None:
    with database.write() as session:
        for data in ({}, {"eval_dataset": "two" * 20}, {"mixture": [{"dataset": "two" * 20}]}):
            run = RunRow(name="r", preset="", dataset_id=1, spec={"data": data}, created_at=1.0)
            session.add(run)
    with database.read() as session:
        found = [datasets.runs_of(session, row) for row in datasets.listing(session)]
    assert found == [[2, 3], [1, 2, 3]]


def test_a_deleted_dataset_takes_its_changes_along_and_leaves_its_versions(
    database: Database,
) -> None:
    put(database, [1], excluded=True)
    with database.write() as session:
        session.get_one(DatasetRow, 2).parent_id = 1
    with database.write() as session:
        datasets.delete_row(session, session.get_one(DatasetRow, 1))
    assert marks(database) == []
    with database.read() as session:
        (left,) = datasets.listing(session)
    assert (left.name, left.parent_id) == ("two", None)


def test_changes_need_their_dataset(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        datasets.put_edits(session, 99, [1], {"excluded": True}, 1.0)
