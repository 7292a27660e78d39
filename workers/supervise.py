"""Hold a Lease while a process works: renew, record what it reports, pass on the wish to stop."""

import logging
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from studio.domain.metrics import Point
from studio.domain.run import RunState
from studio.errors import MachineError
from studio.store import leases, runs
from workers import launcher
from workers.app import Shop

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
RENEW_SECONDS = 5.0


@dataclass(kw_only=True, slots=True)
class News:
    """What a process reported since the last look: columns to set, Points to add."""

    values: dict[str, Any] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to store."""
        return bool(self.values or self.points)


def supervise(
    shop: Shop,
    lease: leases.Lease,
    process: subprocess.Popen[bytes],
    look: Callable[[], News],
) -> int | None:
    """Hold the Lease until the process has ended.

    What cannot be stored, because the disk is full, is kept and tried again; the process goes on.
    Should this function itself fail, the process is killed: nobody would know of it any more.

    Args:
        shop: This worker.
        lease: The Lease under which the process was started.
        process: The process.
        look: Returns what it reported since the last call.

    Returns:
        Its exit code; None when the Lease was lost, and then the process is dead.
    """
    try:
        return _hold(shop, lease, process, look)
    except BaseException:
        launcher.kill(process, lease.mark)
        raise


def _hold(
    shop: Shop,
    lease: leases.Lease,
    process: subprocess.Popen[bytes],
    look: Callable[[], News],
) -> int | None:
    news, renewed, kill_at = News(), 0.0, None
    known: dict[str, Any] = {}
    while True:
        exit_code = process.poll()
        latest = look()
        news.values.update({k: v for k, v in latest.values.items() if known.get(k) != v})
        news.points.extend(latest.points)
        known.update(latest.values)
        if news or time.monotonic() - renewed > RENEW_SECONDS:
            state, stored = _store(shop, lease, news)
            if stored:
                news, renewed = News(), time.monotonic()
        else:
            state = _state(shop, lease)
        if state is None:
            logger.warning("%s is lost; its process is killed", lease.mark)
            launcher.kill(process, lease.mark)
            return None
        if exit_code is not None:
            launcher.kill_marked(lease.mark)
            return exit_code
        if state is RunState.STOPPING and kill_at is None:
            launcher.ask_to_stop(process)
            kill_at = time.monotonic() + launcher.STOP_GRACE_SECONDS + 10
        if kill_at is not None and time.monotonic() > kill_at:
            launcher.kill(process, lease.mark)
        time.sleep(LOOK_SECONDS)


def _store(shop: Shop, lease: leases.Lease, news: News) -> tuple[RunState | None, bool]:
    try:
        with shop.database.write() as session:
            state = leases.renew(session, lease, now=time.time(), values=news.values)
            if state is not None:
                runs.add_points(session, lease.id, news.points)
        return state, True
    except MachineError as error:
        logger.error("%s: %s", lease.mark, error)
        return RunState.RUNNING, False


def _state(shop: Shop, lease: leases.Lease) -> RunState | None:
    with shop.database.read() as session:
        row = session.get(lease.table, lease.id)
        if row is None or (row.epoch, row.owner) != (lease.epoch, lease.owner):
            return None
        state = RunState(row.state)
    return state if state.is_live else None


def end(
    shop: Shop, lease: leases.Lease, state: RunState, values: dict[str, Any] | None = None
) -> None:
    """Record how the work under a Lease ended; a stale Lease records nothing."""
    with shop.database.write() as session:
        done = leases.finish(session, lease, state, now=time.time(), values=values or {})
    if not done:
        logger.warning("%s could not become %s: it is held by another worker", lease.mark, state)
