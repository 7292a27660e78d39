"""Put right what a dead worker left: its processes, its rows, what it had measured, its bells.

Every worker looks every few seconds, for all workers of the home folder. What it does may be done
twice or by two at once without harm: each write names the epoch that it ends.
"""

import logging
import math
import os
import threading
import time
from importlib.metadata import version
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from studio.disk import RunFolder
from studio.dispatch import Bell, Dispatch
from studio.domain.outcome import is_retried
from studio.domain.retry import Attempts, after_crash, after_loss
from studio.domain.run import RunState, Wish
from studio.errors import StudioError
from studio.locks import is_locked
from studio.store import backup, leases, queue, workers
from studio.store.clock import is_of_one_machine, lease_now
from studio.store.leases import LEASE_SECONDS, Lease
from studio.store.rows import ArtifactRow, ChatRow, JobRow, RunRow, WorkerRow
from workers import launcher
from workers.app import Shop
from workers.fence import Fence
from workers.supervise import News, write_news
from workers.training import Tails

logger = logging.getLogger(__name__)

TICK_SECONDS = LEASE_SECONDS / 10
# How often it is asked whether the database was copied today.
COPY_SECONDS = 3600.0
# A lock file of a worker that is gone is kept as long as its processes could be looked for.
_KEEP_LOCK_SECONDS = 24 * 3600.0
_TABLES: tuple[type[JobRow], ...] = (RunRow, ArtifactRow, ChatRow)
_LOST = {
    "type": "WorkerLost",
    "message": "The worker that executed this is gone, and so were those that tried it before.",
    "hint": "Its log and worker.log may say why; resume it once that is mended.",
}
_CHAT_LOST = {
    "type": "WorkerLost",
    "message": "The worker that served this chat is gone.",
    "hint": "Open the chat again.",
}


class Reconciler:
    """What one worker does about all rows, beside its own work.

    Args:
        shop: The worker.
        dispatch: Rings for what waits.
        patience_seconds: How long this worker must have been able to write before it believes that
            a Lease ran out: while a disk is full, a database locked or a machine asleep nobody
            renews, and nobody is dead.
    """

    def __init__(
        self, shop: Shop, dispatch: Dispatch, *, patience_seconds: float = LEASE_SECONDS
    ) -> None:
        self._shop, self._dispatch = shop, dispatch
        self._patience_seconds = patience_seconds
        # Both on the clock of Leases, which goes on while a machine sleeps.
        self._well_since, self._last_look = 0.0, -math.inf
        self._copy_at = time.monotonic() + TICK_SECONDS

    def tick(self) -> None:
        """Look once: say that this worker lives, end what is dead, ring for what waits."""
        try:
            self._report()
            for row in self._lost():
                self._try_to_put_right(row)
            self._sweep()
        except (StudioError, SQLAlchemyError, OSError):
            self._last_look = -math.inf
            raise
        for bell in self._waiting():
            self._dispatch.ring(bell)
        if time.monotonic() > self._copy_at:
            self._copy_at = time.monotonic() + COPY_SECONDS
            backup.backup_if_due(self._shop.database, self._shop.home)

    def _report(self) -> None:
        shop = self._shop
        row = WorkerRow(
            name=shop.owner,
            host=shop.holder.host,
            boot_id=shop.holder.boot_id,
            pid=os.getpid(),
            version=version("delta-studio"),
            started_at=shop.started_at,
            cards=[card.model_dump() for card in shop.slots.cards()],
            is_closing=shop.closing.is_set(),
        )
        with shop.database.write() as session:
            workers.report(session, row)
            workers.forget_dead(session)
            self._is_patient(session)

    def _is_patient(self, session: Session) -> bool:
        """Tell whether everyone has had the time to renew; not if all have just stood still."""
        now = lease_now(session)
        if now - self._last_look > LEASE_SECONDS / 2:
            self._well_since = now
        self._last_look = now
        return now - self._well_since >= self._patience_seconds

    # ---- rows whose worker is gone ------------------------------------------------------------

    def _lost(self) -> list[JobRow]:
        """Return live rows that nobody works on any more."""
        shop, mine = self._shop, self._shop.holder.boot_id
        with shop.database.read() as session:
            is_alone = is_of_one_machine(session)
            live = [row for table in _TABLES for row in leases.live(session, table)]
            over = {
                (type(row), row.id)
                for table in _TABLES
                for row in leases.expired(session, table, mine)
            }
            is_patient = self._is_patient(session)  # last: this look itself may have stood still
        lost = []
        for row in live:
            is_here, is_over = row.boot_id == mine, (type(row), row.id) in over
            if row.owner == shop.owner:
                # The machine has slept, perhaps: then the supervisor is about to renew.
                is_lost = is_over and is_patient and not _has_processes(row)
            elif is_here:
                is_lost = _is_dead(shop, str(row.owner)) or (is_over and is_patient)
            else:
                # Of another machine; or of this one, before it was started again.
                is_lost = is_over and (is_patient or is_alone)
            if is_lost:
                lost.append(row)
        return lost

    def _try_to_put_right(self, row: JobRow) -> None:
        """Put one row right; one that cannot be does not keep the others from it."""
        try:
            self._put_right(row)
        except Exception:
            logger.exception("%s cannot be put right", leases.lease_of(row).mark)

    def _put_right(self, row: JobRow) -> None:
        lease = leases.lease_of(row)
        logger.warning("%s has lost its worker", lease.mark)
        launcher.kill_marked(lease.mark)
        state, values, attempts = _verdict(self._shop, row)
        news = self._left_over(row, lease)
        slots: list[str] = []
        if isinstance(row, RunRow) and row.boot_id == self._shop.holder.boot_id:
            slots = self._shop.slots.names(row.gpus or ())
        with self._shop.database.write() as session:
            now = session.get(type(row), row.id)
            if now is None or (now.state, now.wish) != (row.state, row.wish):
                return  # somebody has just asked for a stop: the next look sees it
            if news:
                if leases.renew(session, lease, news.values) is None:
                    return  # somebody else was faster
                write_news(session, lease, news)
            if state is None:
                is_held = row.wish == Wish.PAUSE
                done = leases.requeue(session, lease, attempts=attempts, is_held=is_held)
                where = "from its latest checkpoint" if isinstance(row, RunRow) else "anew"
                text = f"Its worker on {row.host} was lost; it goes on {where}."
            else:
                done = leases.finish(session, lease, state, values)
                text = f"Its worker on {row.host} was lost; the run had ended: {state.lower()}."
            if done:
                leases.note(session, lease, "worker lost", text)
                self._shop.slots.wrest(lease.owner, row.id, slots)

    def _left_over(self, row: JobRow, lease: Lease) -> News:
        """Return what the dead try had measured and nobody had read."""
        if not isinstance(row, RunRow):
            return News()
        folder = self._shop.home.run(row.id)
        if not _had_begun(folder, row):
            return News()
        try:
            news = Tails(folder, lease.epoch).look()
        except OSError as error:
            logger.error("what %s had measured cannot be read: %s", lease.mark, error)
            return News()
        news.values.pop("stage", None)
        news.begins_at = None
        return news

    # ---- processes without a row --------------------------------------------------------------

    def _sweep(self) -> None:
        """Kill processes of this home folder whose Lease is not the one that holds."""
        shop = self._shop
        for pid, mark in list(launcher.all_marks()):
            table, row_id, epoch, owner = _parts(mark)
            if table is None or not shop.home.worker(owner).exists():
                continue  # of another home folder
            with shop.database.read() as session:
                row = session.get(table, row_id)
            is_held = row is not None and (row.epoch, row.owner) == (epoch, owner)
            if row is None or not is_held or not RunState(row.state).is_live:
                logger.warning("process %d of %s is left over", pid, mark)
                killed = launcher.kill_marked(mark)
                if killed and row is not None:
                    one = "1 process of an earlier try was"
                    many = f"{len(killed)} processes of an earlier try were"
                    text = f"{one if len(killed) == 1 else many} found and ended."
                    with shop.database.write() as session:
                        lease = Lease(table=table, id=row_id, epoch=epoch, owner=owner)
                        leases.note(session, lease, "left over", text)
        for path in shop.home.workers.glob("*.lock"):
            is_old = time.time() - path.stat().st_mtime > _KEEP_LOCK_SECONDS
            if is_old and not is_locked(path):
                path.unlink(missing_ok=True)

    # ---- bells --------------------------------------------------------------------------------

    def _waiting(self) -> list[Bell]:
        with self._shop.database.read() as session:
            bells = [Bell.TRAIN] if queue.ready(session) else []
            bells += [Bell.MERGE] if leases.queued(session, ArtifactRow) else []
            bells += [Bell.SERVE] if leases.queued(session, ChatRow) else []
        return bells


def start(shop: Shop) -> threading.Thread:
    """Start the reconciler of a worker."""
    reconciler = Reconciler(shop, shop.bells)
    thread = threading.Thread(target=_loop, args=(shop, reconciler), name="reconcile", daemon=True)
    thread.start()
    return thread


def _loop(shop: Shop, reconciler: Reconciler) -> None:
    while not shop.closing.is_set():
        try:
            reconciler.tick()
        except (StudioError, SQLAlchemyError, OSError) as error:
            # The next look may find the database free and the disk there again.
            logger.error("reconcile: %s", error)
        except Exception:
            # Without this thread no run of a lost worker would ever go on.
            logger.exception("reconcile: a fault of the studio")
        shop.closing.wait(TICK_SECONDS)


def _verdict(shop: Shop, row: JobRow) -> tuple[RunState | None, dict[str, object], Attempts | None]:
    """Return how a row whose worker is gone ends; no state where it is tried again."""
    attempts = leases.attempts_of(row)
    if isinstance(row, ChatRow):
        if row.state == RunState.STOPPING:
            return RunState.STOPPED, {"stage": "", "port": None}, None
        error = launcher.read_json(shop.home.chat(row.id).error) or _CHAT_LOST
        return RunState.FAILED, {"error": error, "stage": "", "port": None}, None
    is_stop = row.state == RunState.STOPPING and row.wish != Wish.PAUSE
    step = row.step if isinstance(row, RunRow) else 0
    result, words = _written(shop, row)
    if result is not None and (result["state"] == RunState.FINISHED or is_stop):
        return RunState(result["state"]), {"result": result, "stage": ""}, None
    if is_stop:
        return RunState.STOPPED, {"stage": ""}, None
    if words is not None:
        code = int(words.get("code", 1))
        tried = after_crash(attempts, step) if is_retried(code) else None
    else:
        tried = after_loss(attempts, step)
    if tried is not None or row.wish == Wish.PAUSE:
        return None, {}, tried
    return RunState.FAILED, {"error": words or _LOST, "stage": ""}, None


def _written(shop: Shop, row: JobRow) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return how the latest try of a Run or a Merge says that it ended, well or badly."""
    if isinstance(row, ArtifactRow):
        return None, launcher.read_json(shop.home.merge(row.id).error)
    folder = shop.home.run(row.id)
    if not isinstance(row, RunRow) or not _had_begun(folder, row):
        return None, None
    # With a store of files, what it made may not have got there: the next try sees to that.
    result = None if shop.files.is_on else launcher.read_json(folder.result)
    return result, launcher.read_json(folder.error)


def _had_begun(folder: RunFolder, row: RunRow) -> bool:
    """Tell whether what lies in a run folder is of the latest try, and not of one before it."""
    return not Fence(owner=folder.owner, mark=leases.lease_of(row).mark).is_lost()


def _is_dead(shop: Shop, owner: str) -> bool:
    """Tell whether a worker of this home folder is gone; of others only their Leases tell."""
    lock = shop.home.worker(owner)
    return lock.exists() and not is_locked(lock)


def _has_processes(row: JobRow) -> bool:
    return any(launcher.marked(leases.lease_of(row).mark))


def _parts(mark: str) -> tuple[type[JobRow] | None, int, int, str]:
    parts = mark.split(":", 3)
    named = {table.__tablename__: table for table in _TABLES}
    if len(parts) != 4 or parts[0] not in named or not (parts[1] + parts[2]).isdecimal():
        return None, 0, 0, ""
    return named[parts[0]], int(parts[1]), int(parts[2]), parts[3]
