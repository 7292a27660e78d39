"""Copy what a machine without a shared home folder needs and makes: before, during and after work.

Copies may take minutes, and a Lease half of one: during work they are made in a thread beside the
supervisor, before and after it the Lease is renewed meanwhile.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from studio.disk import OrderFolder, RunFolder
from studio.domain.spec import JobSpec
from studio.errors import MachineError
from studio.store import leases
from workers.app import Shop
from workers.supervise import RENEW_SECONDS, LeaseLostError, still_hold

logger = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
HELD_SECONDS = 1.0
MAX_LIVE_LOG_BYTES = 2**20


@contextmanager
def holding(shop: Shop, lease: leases.Lease, stage: str) -> Iterator[None]:
    """Renew a Lease while something is done for which there is no process yet, or no more.

    Raises:
        LeaseLostError: It was lost before, or meanwhile.
    """
    still_hold(shop, lease)
    over = threading.Event()

    def renew() -> None:
        while not over.wait(RENEW_SECONDS):
            try:
                with shop.database.write() as session:
                    leases.renew(session, lease, {"stage": stage})
            except (MachineError, SQLAlchemyError) as error:
                logger.error("%s: %s", lease.mark, error)

    thread = threading.Thread(target=renew, name="holding", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    still_hold(shop, lease)


class RunFiles:
    """The files of one Run on their way.

    Args:
        shop: This worker.
        folder: The run folder.
        lease: The Lease under which the Run is executed; without it nothing is copied there.
    """

    def __init__(self, shop: Shop, folder: RunFolder, lease: leases.Lease) -> None:
        self._files, self._folder = shop.files, folder
        self._shop, self._lease, self._held = shop, lease, 0.0
        self._thread: threading.Thread | None = None
        self._offered = time.monotonic()

    def fetch(self, spec: JobSpec) -> None:
        """Bring the Datasets, and what earlier tries have left.

        Raises:
            MachineError: The store cannot be read.
        """
        home, data = self._folder.home, spec.data
        named = [data.dataset, *[part.dataset for part in data.mixture]]
        named += [data.eval_dataset] if data.eval_dataset else []
        for sha256 in named:
            self._files.pull(home.dataset(sha256), home.dataset_index(sha256))
        self._files.pull(self._folder.path)

    def offer(self) -> None:
        """Begin to copy what is new, unless that was done a moment ago or is not done yet."""
        is_busy = self._thread is not None and self._thread.is_alive()
        if not self._files.is_on or is_busy:
            return
        if time.monotonic() - self._offered < EVERY_SECONDS:
            return
        self._offered = time.monotonic()
        self._thread = threading.Thread(target=self._offer, name="offer", daemon=True)
        self._thread.start()

    def hand_over(self) -> None:
        """Copy all that the Run has made.

        Raises:
            MachineError: The store cannot be written.
            LeaseLostError: Another worker has the Run by now.
        """
        if not self._files.is_on:
            return
        if self._thread is not None:
            self._thread.join()
        self._files.push(self._folder.path, may=self._hold)
        self._forget_pruned()

    def _hold(self) -> None:
        """See that the Lease is held, at most every second: this worker may have stood still."""
        if time.monotonic() - self._held > HELD_SECONDS:
            still_hold(self._shop, self._lease)
            self._held = time.monotonic()

    def _offer(self) -> None:
        try:
            self._files.push(*self._live(), may=self._hold)
            self._forget_pruned()
        except LeaseLostError:
            logger.warning("%s was lost: nothing of it is copied any more", self._lease.mark)
        except (MachineError, OSError) as error:
            # The next copy takes it along; the end of the run waits for it.
            logger.error("%s could not be copied: %s", self._folder.path.name, error)

    def _live(self) -> Sequence[Path]:
        folder = self._folder
        paths = [folder.stage, folder.metrics, folder.events, folder.samples, folder.proofs]
        if folder.log.exists() and folder.log.stat().st_size < MAX_LIVE_LOG_BYTES:
            paths.append(folder.log)
        return [*paths, folder.checkpoints]

    def _forget_pruned(self) -> None:
        if self._folder.checkpoints.is_dir():
            kept = [path.name for path in self._folder.checkpoints.iterdir()]
            self._files.forget(self._folder.checkpoints, kept, may=self._hold)


def fetch_trained(shop: Shop, run: RunFolder) -> None:
    """Bring what a Run has learned.

    Raises:
        MachineError: The store cannot be read.
    """
    shop.files.pull(run.adapter, run.model)


def hand_over_merge(shop: Shop, folder: OrderFolder) -> None:
    """Copy a Merge and its Certificate.

    Raises:
        MachineError: The store cannot be written.
    """
    shop.files.push(folder.weights, folder.certificate, folder.log)
