"""Hold a Lease while a process works: renew, record what it reports, pass on what a user wishes."""

import logging
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from studio.domain.metrics import Point
from studio.domain.retry import Attempts
from studio.domain.run import RunState
from studio.errors import MachineError
from studio.store import events, leases, runs
from studio.store.rows import JobRow, RunRow
from workers import launcher
from workers.app import Shop
from workers.follow import Event

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_SECONDS = 0.25
RENEW_SECONDS = leases.LEASE_SECONDS / 6
DUMP_SECONDS = 2.0
# How long the end of a process waits for a database that cannot be written.
PATIENCE_SECONDS = 600.0
# Loading and saving may be silent for longer than a step.
SILENT_STAGE_FACTOR = 8
STEPPING = frozenset({"training", "evaluating"})


@dataclass(kw_only=True, slots=True)
class News:
    """What a process reported since the last look.

    Attributes:
        values: Columns to set.
        points: Points to add.
        events: What happened.
        begins_at: Step that the process goes on from; what was measured behind it is forgotten.
    """

    values: dict[str, Any] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    begins_at: int | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to store."""
        return bool(self.values or self.points or self.events)


@dataclass(kw_only=True, slots=True)
class Work:
    """A process and what is done beside it.

    Attributes:
        lease: The Lease under which it was started.
        process: The process.
        look: Returns what it reported since the last call.
        heed: Told the row at each look: passes on what a user wishes.
        hang_seconds: How long it may take a step; None does not ask.
        hung: Called once a process that did nothing for too long has been killed.
    """

    lease: leases.Lease
    process: subprocess.Popen[bytes]
    look: Callable[[], News]
    heed: Callable[[JobRow], None] | None = None
    hang_seconds: float | None = None
    hung: Callable[[float], None] | None = None


def supervise(shop: Shop, work: Work) -> int | None:
    """Hold the Lease until the process has ended.

    What cannot be stored, because the disk is full or the database cannot be reached, is kept and
    tried again; the process goes on. Should this function itself fail, the process is killed:
    nobody would know of it any more.

    Returns:
        Its exit code; None when the Lease was lost, and then the process is dead.
    """
    try:
        return _Watch(shop, work).hold()
    except BaseException:
        launcher.kill(work.process, work.lease.mark)
        raise


class _Watch:
    """One process under its Lease."""

    def __init__(self, shop: Shop, work: Work) -> None:
        self._shop, self._work = shop, work
        self._news = News()
        self._known: dict[str, Any] = {}
        self._renewed = 0.0
        self._moved = time.monotonic()
        self._kill_at: float | None = None

    def hold(self) -> int | None:
        """Return the exit code of the process; None when the Lease was lost."""
        work = self._work
        while True:
            exit_code = work.process.poll()
            self._listen()
            row = self._store_or_read()
            if row is None:
                logger.warning("%s is lost; its process is killed", work.lease.mark)
                launcher.kill(work.process, work.lease.mark)
                return None
            if exit_code is not None:
                if self._shop.closing.is_set() and self._kill_at is None:
                    self._kill_at = time.monotonic() + launcher.STOP_GRACE_SECONDS + 10
                if not self._news or row or self._is_late():
                    launcher.kill_marked(work.lease.mark)
                    return exit_code
            else:
                self._heed(row or None)
            self._watch_hang()
            time.sleep(LOOK_SECONDS)

    def _listen(self) -> None:
        try:
            latest = self._work.look()
        except (MachineError, OSError) as error:
            logger.error("%s cannot be followed now: %s", self._work.lease.mark, error)
            latest = News()
        news = self._news
        changed = {k: v for k, v in latest.values.items() if self._known.get(k) != v}
        if latest.begins_at is not None:
            news.begins_at = latest.begins_at
            news.points = [point for point in news.points if point.step <= latest.begins_at]
        news.values.update(changed)
        news.points.extend(latest.points)
        news.events.extend(latest.events)
        self._known.update(latest.values)
        if changed or latest.points or latest.events:
            self._moved = time.monotonic()

    def _is_late(self) -> bool:
        """Tell whether a worker that shall end has waited long enough for its database."""
        if self._kill_at is None or not self._shop.closing.is_set():
            return False
        return time.monotonic() > self._kill_at - launcher.STOP_GRACE_SECONDS

    def _store_or_read(self) -> JobRow | Literal[False] | None:
        """Return the row; None when the Lease is lost, False when the database cannot be asked."""
        try:
            is_due = self._news or time.monotonic() - self._renewed > RENEW_SECONDS
            row = _store(self._shop, self._work.lease, self._news) if is_due else self._read()
        except (MachineError, SQLAlchemyError) as error:
            logger.error("%s: %s", self._work.lease.mark, error)
            return False
        if is_due and row is not None:
            self._news, self._renewed = News(), time.monotonic()
        return row

    def _read(self) -> JobRow | None:
        lease = self._work.lease
        with self._shop.database.read() as session:
            row = session.get(lease.table, lease.id)
        if row is None or (row.epoch, row.owner) != (lease.epoch, lease.owner):
            return None
        return row if RunState(row.state).is_live else None

    def _heed(self, row: JobRow | None) -> None:
        work = self._work
        is_stopping = row is not None and row.state == RunState.STOPPING
        is_asked = is_stopping or self._shop.closing.is_set()
        if is_asked and self._kill_at is None:
            launcher.ask_to_stop(work.process)
            self._kill_at = time.monotonic() + launcher.STOP_GRACE_SECONDS + 10
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            launcher.kill(work.process, work.lease.mark)
        if work.heed is not None and row is not None:
            try:
                work.heed(row)
            except MachineError as error:  # a wish can wait until the disk has room again
                logger.error("%s: %s", work.lease.mark, error)

    def _watch_hang(self) -> None:
        work, silent = self._work, time.monotonic() - self._moved
        if work.hang_seconds is None or self._kill_at is not None:
            return
        is_stepping = self._known.get("stage") in STEPPING
        limit = work.hang_seconds * (1 if is_stepping else SILENT_STAGE_FACTOR)
        if silent < limit or work.process.poll() is not None:
            return
        logger.error("%s has done nothing for %.0f s; it is killed", work.lease.mark, silent)
        launcher.dump_stacks(work.lease.mark)
        time.sleep(DUMP_SECONDS)
        launcher.kill(work.process, work.lease.mark)
        self._moved = time.monotonic()
        if work.hung is not None:
            with suppress(MachineError, OSError):  # without these words it is told as killed
                work.hung(silent)


def _store(shop: Shop, lease: leases.Lease, news: News) -> JobRow | None:
    with shop.database.write() as session:
        if leases.renew(session, lease, news.values) is None:
            return None
        write_news(session, lease, news)
        return session.get(lease.table, lease.id)


def write_news(session: Any, lease: leases.Lease, news: News) -> None:
    """Store Points and events of a Run; the transaction has seen that the Lease is held."""
    if lease.table is RunRow:
        if news.begins_at is not None:
            runs.forget_points(session, lease.id, news.begins_at)
        runs.add_points(session, lease.id, news.points)
    events.add_new(session, lease.table, lease.id, news.events)


def end(
    shop: Shop, lease: leases.Lease, state: RunState, values: dict[str, Any] | None = None
) -> None:
    """Record how the work under a Lease ended; a stale Lease records nothing."""
    record(shop, lease, lambda session: ended(session, lease, state, values or {}))


def again(
    shop: Shop, lease: leases.Lease, *, kind: str, text: str, attempts: Attempts | None = None
) -> None:
    """Put a row back into the queue; see `queued_again`."""
    record(
        shop,
        lease,
        lambda session: queued_again(session, lease, kind=kind, text=text, attempts=attempts),
    )


def record(shop: Shop, lease: leases.Lease, write: Callable[[Session], bool]) -> None:
    """Write how the work under a Lease ended, once the database can be written.

    Args:
        shop: This worker.
        lease: The Lease.
        write: Does it in one transaction; tells whether it was done, and not refused.

    Raises:
        NotRecordedError: The database could not be written for too long.
    """

    def attempt() -> bool:
        with shop.database.write() as session:
            return write(session)

    try:
        done = surely(shop, attempt)
    except MachineError as error:
        raise NotRecordedError(lease.mark) from error
    if not done:
        logger.warning("the end of %s is not recorded: it is held by another worker", lease.mark)


def ended(session: Session, lease: leases.Lease, state: RunState, values: dict[str, Any]) -> bool:
    """End a row, and say in its history how.

    Returns:
        Whether it was changed; False when the Lease is lost or the move is not allowed.
    """
    done = leases.finish(session, lease, state, values)
    if done:
        words = values.get("error") or {}
        text = str(words.get("message", "")) or f"It {state.lower()}."
        leases.note(session, lease, state.lower(), text)
    return done


def queued_again(
    session: Session,
    lease: leases.Lease,
    *,
    kind: str,
    text: str,
    attempts: Attempts | None = None,
    is_held: bool = False,
) -> bool:
    """Put a row back into the queue, and say why in its history.

    Args:
        session: A write transaction.
        lease: The Lease that ends; a stale one changes nothing.
        kind: Of the event.
        text: Of the event.
        attempts: How often it was tried, to be kept.
        is_held: Whether it waits until somebody lets it go on.

    Returns:
        Whether it was changed.
    """
    done = leases.requeue(session, lease, attempts=attempts, is_held=is_held)
    if done:
        leases.note(session, lease, kind, text)
    return done


class NotRecordedError(Exception):
    """How work has ended stands in its folder, but not in its row."""


class LeaseLostError(Exception):
    """Another worker has taken the row over: nothing of it may be touched any more."""


def still_hold(shop: Shop, lease: leases.Lease) -> None:
    """Renew a Lease before something is done that cannot be undone.

    Raises:
        LeaseLostError: It is lost; this worker may have stood still for longer than a Lease.
        MachineError: The database cannot be written, as in `surely`.
    """

    def write() -> bool:
        with shop.database.write() as session:
            return leases.renew(session, lease, {}) is not None

    if not surely(shop, write):
        raise LeaseLostError(lease.mark)


def surely(shop: Shop, write: Callable[[], T]) -> T:
    """Write once that can be done again: a full disk, or the restart of a database, ends.

    Raises:
        MachineError: It could not be done for ten minutes, or the worker shall end.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return write()
        except MachineError as error:
            if time.monotonic() > deadline or shop.closing.is_set():
                raise
            logger.error("what ended cannot be recorded yet: %s", error)
            time.sleep(1.0)
