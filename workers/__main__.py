"""One worker process: `python -m workers --home DIR [--embedded]`.

An embedded worker belongs to a page but does not die with it: a running job goes on. It ends by
itself when no page is open on its home folder and nothing is left to do.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from celery.signals import worker_shutting_down

from studio.disk import Home, is_locked, take_lock, worker_note
from studio.settings import Settings
from studio.store import leases
from studio.store.database import Database
from studio.store.rows import ArtifactRow, RunRow
from workers import reconcile
from workers.app import Shop, app, configure

logger = logging.getLogger("workers")

NUM_THREADS = 8
LOCK_TAKEN_EXIT_CODE = 3
IDLE_LOOKS_BEFORE_END = 3
LOOK_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker until it is asked to end.

    Returns:
        0, or 3 when another worker serves this home folder.
    """
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="home folder of the studio")
    parser.add_argument("--embedded", action="store_true", help="end when no page needs it")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    home = Home(path=options.home.expanduser().resolve())
    home.create()
    lock = take_lock(home.worker_lock)
    if lock is None:
        logger.error("another worker serves %s already", home.path)
        return LOCK_TAKEN_EXIT_CODE
    _note(lock, is_closing=False)
    shop = Shop(
        home=home,
        database=Database(home.database),
        settings=Settings(),
        owner=f"worker-{os.getpid()}-{uuid.uuid4().hex[:8]}",
    )
    configure(shop)

    def close(**_: object) -> None:
        shop.refusing.set()
        _note(lock, is_closing=True)
        shop.closing.set()

    worker_shutting_down.connect(close, weak=False)
    reconcile.start(shop)
    if options.embedded:
        threading.Thread(target=_end_when_idle, args=(shop, lock), daemon=True).start()
    app.worker_main(
        [
            "worker",
            "--pool=threads",
            f"--concurrency={NUM_THREADS}",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            "--loglevel=INFO",
        ]
    )
    lock.close()
    return 0


def _note(lock: TextIOWrapper, *, is_closing: bool) -> None:
    lock.seek(0)
    lock.truncate(0)
    lock.write(worker_note(os.getpid(), is_closing=is_closing))
    lock.flush()


def _end_when_idle(shop: Shop, lock: TextIOWrapper) -> None:
    idle = 0
    while not shop.closing.wait(LOOK_SECONDS):
        idle = idle + 1 if not is_locked(shop.home.client_lock) and not _has_work(shop) else 0
        if idle >= IDLE_LOOKS_BEFORE_END and _close(shop, lock):
            logger.info("no page is open and nothing is left to do: ending")
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _close(shop: Shop, lock: TextIOWrapper) -> bool:
    """Announce the end, unless somebody needs the worker after all.

    Whoever needs a worker locks the client lock before it looks at the worker: either this sees
    that lock or the work, or the other sees the announcement and starts a worker of its own.
    """
    nobody = take_lock(shop.home.client_lock)
    if nobody is None:
        return False
    with nobody:
        # From here on no task claims; what was claimed or queued until here is seen below.
        shop.refusing.set()
        if _has_work(shop):
            shop.refusing.clear()
            return False
        _note(lock, is_closing=True)
        return True


def _has_work(shop: Shop) -> bool:
    # A chat without a page is of no use to anyone; runs and merges are.
    with shop.database.read() as session:
        return any(
            leases.queued(session, table) or leases.live(session, table)
            for table in (RunRow, ArtifactRow)
        )


if __name__ == "__main__":
    sys.exit(main())
