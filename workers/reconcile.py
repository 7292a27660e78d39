"""Put right what a dead worker left: end its rows, kill its processes, ring lost bells again."""

import logging
import threading
import time
from collections.abc import Sequence

from sqlalchemy.exc import SQLAlchemyError

from studio.dispatch import Bell, CeleryDispatch, Dispatch
from studio.domain.run import RunState
from studio.errors import StudioError
from studio.store import leases, runs
from studio.store.rows import ArtifactRow, ChatRow, JobRow, RunRow
from workers import follow, launcher
from workers.app import Shop

logger = logging.getLogger(__name__)

TICK_SECONDS = 5.0
_BELLS: tuple[tuple[type[JobRow], Bell], ...] = (
    (RunRow, Bell.TRAIN),
    (ArtifactRow, Bell.MERGE),
    (ChatRow, Bell.SERVE),
)


def start(shop: Shop) -> threading.Thread:
    """Start the reconciler of a worker.

    A worker holds the home folder's worker lock, so that at its start no other one lives: rows
    that are held by anyone else are orphans, whatever their Lease says.
    """
    end_orphans(shop, _held_by_others(shop))
    dispatch = CeleryDispatch(shop.home)
    thread = threading.Thread(target=_loop, args=(shop, dispatch), name="reconcile", daemon=True)
    thread.start()
    return thread


def _loop(shop: Shop, dispatch: Dispatch) -> None:
    while not shop.closing.is_set():
        try:
            tick(shop, dispatch)
        except (StudioError, SQLAlchemyError, OSError) as error:
            # The next look may find the database free and the disk there again.
            logger.error("reconcile: %s", error)
        shop.closing.wait(TICK_SECONDS)


def tick(shop: Shop, dispatch: Dispatch) -> None:
    """Look once: end what expired, ring for what waits."""
    end_orphans(shop, _expired(shop))
    with shop.database.read() as session:
        waiting = [bell for table, bell in _BELLS if leases.queued(session, table)]
    for bell in waiting:
        dispatch.ring(bell)


def end_orphans(shop: Shop, rows: Sequence[JobRow]) -> None:
    """End rows whose worker is gone: kill their processes, keep what they had reported."""
    for row in rows:
        lease = leases.Lease(table=type(row), id=row.id, epoch=row.epoch, owner=str(row.owner))
        if row.owner == shop.owner and any(launcher.marked(lease.mark)):
            continue  # the machine has slept: this worker's own supervisor is about to renew
        logger.warning("%s has lost its worker", lease.mark)
        launcher.kill_marked(lease.mark)
        state, values = _last_words(shop, row)
        with shop.database.write() as session:
            if isinstance(row, RunRow):
                records = follow.Follower(shop.home.run(row.id).metrics).read()
                runs.add_points(session, row.id, follow.points(records))
                if records:
                    values |= {"step": records[-1].step, "total_steps": records[-1].total_steps}
            leases.finish(session, lease, state, now=time.time(), values=values)


def _last_words(shop: Shop, row: JobRow) -> tuple[RunState, dict[str, object]]:
    if isinstance(row, RunRow):
        result = launcher.read_json(shop.home.run(row.id).result)
        if result is not None:
            reached = RunState(result["state"])
            if reached is RunState.FINISHED or row.state == RunState.STOPPING:
                return reached, {"result": result, "stage": ""}
    if row.state == RunState.STOPPING:
        return RunState.STOPPED, {"stage": ""}
    words = _own_words(shop, row) or {
        "type": "WorkerLost",
        "message": "The worker that executed this is gone, so the work was ended.",
        "hint": "Launch it again; what it had measured until then is kept.",
    }
    return RunState.FAILED, {"error": words, "stage": ""}


def _own_words(shop: Shop, row: JobRow) -> dict[str, object] | None:
    """Return what the process itself said of its failure, after its worker was gone."""
    if isinstance(row, RunRow):
        return launcher.read_json(shop.home.run(row.id).error)
    folder = shop.home.merge if isinstance(row, ArtifactRow) else shop.home.chat
    return launcher.read_json(folder(row.id).error)


def _held_by_others(shop: Shop) -> list[JobRow]:
    with shop.database.read() as session:
        return [
            row
            for table, _ in _BELLS
            for row in leases.live(session, table)
            if row.owner != shop.owner
        ]


def _expired(shop: Shop) -> list[JobRow]:
    now = time.time()
    with shop.database.read() as session:
        return [row for table, _ in _BELLS for row in leases.expired(session, table, now=now)]
