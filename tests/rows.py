"""Rows and workers that the tests of the light half of `workers` start from."""

import uuid
from pathlib import Path

from studio.disk import Home
from studio.domain.placement import Placement
from studio.domain.run import RunState
from studio.domain.spec import JobSpec
from studio.settings import Settings
from studio.store import leases, queue
from studio.store.clock import holder
from studio.store.database import Database
from studio.store.rows import DatasetRow, RunRow
from workers.app import Shop, open_shop

NO_DATASET = "0" * 64


def make_owner() -> str:
    """Return the name of a worker; as it is part of the mark, no two tests share one."""
    return f"worker-{uuid.uuid4().hex}"


def make_shop(home_folder: Path) -> Shop:
    """Return what a worker on a home folder has at hand."""
    home = Home(path=home_folder)
    home.create()
    return open_shop(home, Settings(home=home_folder), make_owner())


def add_run(database: Database) -> int:
    """Queue a Run on a Dataset whose file does not exist; return its number."""
    with database.write() as session:
        dataset = session.query(DatasetRow).first()
        if dataset is None:
            dataset = DatasetRow(
                name="d",
                sha256=NO_DATASET,
                source_name="d",
                num_conversations=1,
                size_bytes=1,
                report={},
                created_at=1.0,
            )
            session.add(dataset)
            session.flush()
        spec = JobSpec.model_validate({"data": {"dataset": NO_DATASET}}).model_dump(mode="json")
        row = RunRow(name="r", preset="", dataset_id=dataset.id, spec=spec, created_at=1.0)
        session.add(row)
    return row.id


def anywhere(_: RunRow) -> Placement:
    """Place a Run without looking at the machine."""
    return Placement(fits=True)


def claim(database: Database, owner: str) -> leases.Lease:
    """Claim the next queued Run."""
    with database.write() as session:
        claimed = queue.claim(session, holder(owner), anywhere)
    assert claimed is not None
    return leases.lease_of(claimed[0])


def put_back(database: Database, run_id: int) -> None:
    """Queue a live Run again, as a reconciler that lets Runs be repeated would."""
    with database.write() as session:
        row = session.get(RunRow, run_id)
        assert row is not None
        row.state = RunState.QUEUED


def get_run(database: Database, run_id: int) -> RunRow:
    """Return a Run."""
    with database.read() as session:
        row = session.get(RunRow, run_id)
    assert row is not None
    return row
