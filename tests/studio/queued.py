"""Runs, workers and Checkpoints that the tests of the run column start from."""

import hashlib
import json
from pathlib import Path

from studio.domain.metrics import Point
from studio.domain.placement import Card
from studio.domain.preset import merge_values
from studio.domain.run import RunState
from studio.domain.spec import JobSpec
from studio.services import datasets, runs
from studio.services.studio import Studio
from studio.store import leases, workers
from studio.store import runs as store
from studio.store.clock import boot_id, holder
from studio.store.rows import RunRow, WorkerRow


def example_spec(studio: Studio, **changes: object) -> JobSpec:
    """Return a spec of a tiny model on the example Dataset."""
    name = datasets.import_example(studio).name
    spec = merge_values({"data": {"dataset": name}}, changes)
    return runs.spec_from_preset(studio, "tiny-qwen3.5", spec)


def submit(studio: Studio, **changes: object) -> int:
    """Queue a Run; return its number."""
    return runs.submit(studio, example_spec(studio, **changes)).id


def start(studio: Studio, run_id: int, worker: str = "w") -> leases.Lease:
    """Let a worker take a Run."""
    with studio.database.write() as session:
        row = session.get_one(RunRow, run_id)
        leases.take(session, row, holder(worker))
    return leases.lease_of(row)


def end(studio: Studio, run_id: int, state: RunState) -> None:
    """Let a Run be taken and end at once."""
    lease = start(studio, run_id)
    with studio.database.write() as session:
        if state is RunState.STOPPED:
            leases.move(session, RunRow, run_id, RunState.STOPPING)
        assert leases.finish(session, lease, state, {})


def add_worker(studio: Studio, name: str, *cards: Card) -> None:
    """Let a worker of this machine say that it lives."""
    row = WorkerRow(
        name=name,
        host=holder(name).host,
        boot_id=boot_id(),
        pid=1,
        version="1",
        started_at=1.0,
        cards=[card.model_dump(mode="json") for card in cards],
        is_closing=False,
    )
    with studio.database.write() as session:
        workers.report(session, row)


def card(index: int, gib: float = 80.0) -> Card:
    """Return a GPU that nobody uses."""
    return Card(uuid=f"GPU-{index}", index=index, name="card", total_gib=gib, free_gib=gib)


def add_checkpoint(studio: Studio, run_id: int, step: int, loss: float | None = None) -> Path:
    """Give a Run a Checkpoint that holds no tensors, as the engine lays it out."""
    folder = studio.home.run(run_id).checkpoint(step)
    (folder / "tensors").mkdir(parents=True)
    contents = {"state.json": b'{"version": 2}', "tensors/model.safetensors": b"x" * 1000}
    files = {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"version": 2, "files": files}))
    if loss is not None:
        with studio.database.write() as session:
            store.add_points(session, run_id, [Point(step=step, name="eval_loss", value=loss)])
    return folder
