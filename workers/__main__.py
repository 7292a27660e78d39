"""One worker process: `python -m workers --home DIR [--embedded]`.

Any number of workers may serve one home folder; the cards of a machine are shared out between
them by lock files. An embedded worker belongs to a page but does not die with it: a running job
goes on. It ends by itself when no page is open on its home folder and nothing is left to do.

A worker that is asked to end (SIGTERM) lets its runs save a Checkpoint and puts them back into the
queue.
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

from studio.disk import Home
from studio.errors import StudioError
from studio.locks import is_locked, take_lock, take_lock_soon, worker_note
from studio.settings import Settings
from studio.store import leases, queue, workers
from studio.store.rows import ArtifactRow, RunRow
from workers import reconcile
from workers.app import Command, Shop, app, configure, open_shop
from workers.launcher import trainer_command
from workers.tasks import MAX_LIVE_CHATS, MAX_LIVE_MERGES

logger = logging.getLogger("workers")

NOT_STARTED_EXIT_CODE, LOCK_TAKEN_EXIT_CODE = 2, 3
IDLE_LOOKS_BEFORE_END = 3
LOOK_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None, *, command: Command = trainer_command) -> int:
    """Run a worker until it is asked to end.

    Args:
        arguments: Of the command line.
        command: Makes the command of a Run from its folder and its number of cards.

    Returns:
        0; 2 when it could not start, its log says why; 3 when another embedded worker serves this
        home folder.
    """
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="home folder of the studio")
    parser.add_argument("--embedded", action="store_true", help="end when no page needs it")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    home = Home(path=options.home.expanduser().resolve())
    home.create()
    embedded = take_lock_soon(home.worker_lock) if options.embedded else None
    if options.embedded and embedded is None:
        logger.error("another worker serves %s already", home.path)
        return LOCK_TAKEN_EXIT_CODE
    name = f"worker-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    own = take_lock_soon(home.worker(name))
    assert own is not None, "nobody else knows this name"
    notes = [lock for lock in (own, embedded) if lock is not None]
    _note(notes, is_closing=False)
    try:
        shop = open_shop(home, Settings(), name, command=command)
    except StudioError as error:
        logger.error("%s", error)
        return NOT_STARTED_EXIT_CODE
    configure(shop)

    def close(**_: object) -> None:
        shop.refusing.set()
        _note(notes, is_closing=True)
        shop.closing.set()

    worker_shutting_down.connect(close, weak=False)
    reconcile.start(shop)
    if options.embedded:
        threading.Thread(target=_end_when_idle, args=(shop, notes), daemon=True).start()
    app.worker_main(_celery_arguments(shop))
    _leave(shop)
    for lock in notes:
        lock.close()
    return 0


def _celery_arguments(shop: Shop) -> list[str]:
    # A thread for each card and the CPU, for merges and chats, and one for bells in vain.
    threads = len(shop.slots.cards()) + 1 + MAX_LIVE_MERGES + MAX_LIVE_CHATS + 1
    return [
        "worker",
        "--pool=threads",
        f"--concurrency={threads}",
        f"--hostname={shop.owner}@%h",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
        "--loglevel=INFO",
    ]


def _leave(shop: Shop) -> None:
    try:
        with shop.database.write() as session:
            workers.leave(session, shop.owner)
    except StudioError as error:
        logger.error("the list of workers could not be written: %s", error)


def _note(locks: Sequence[TextIOWrapper], *, is_closing: bool) -> None:
    for lock in locks:
        lock.seek(0)
        lock.truncate(0)
        lock.write(worker_note(os.getpid(), is_closing=is_closing))
        lock.flush()


def _end_when_idle(shop: Shop, locks: Sequence[TextIOWrapper]) -> None:
    idle = 0
    while not shop.closing.wait(LOOK_SECONDS):
        idle = idle + 1 if not is_locked(shop.home.client_lock) and not _has_work(shop) else 0
        if idle >= IDLE_LOOKS_BEFORE_END and _close(shop, locks):
            logger.info("no page is open and nothing is left to do: ending")
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _close(shop: Shop, locks: Sequence[TextIOWrapper]) -> bool:
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
        _note(locks, is_closing=True)
        return True


def _has_work(shop: Shop) -> bool:
    # A chat without a page is of no use to anyone; runs and merges are.
    with shop.database.read() as session:
        if leases.queued(session, ArtifactRow):
            return True
        is_held = any(leases.live(session, table) for table in (RunRow, ArtifactRow))
        return is_held or any(not row.is_held for row in queue.waiting(session))


if __name__ == "__main__":
    sys.exit(main())
