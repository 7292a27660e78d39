"""Tasks: what a bell makes a worker do. Rung by name from studio.dispatch.

Each looks for work until none is left: the row says what is to be done, the bell only that
something may be. So a bell that is doubled, lost or late changes nothing.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from studio.dispatch import Bell
from studio.domain.placement import Placement, place
from studio.domain.run import RunState
from studio.errors import StudioError
from studio.store import leases, queue
from studio.store.rows import ArtifactRow, ChatRow, JobRow, RunRow
from workers import orders, training
from workers.app import Shop, app, shop
from workers.slots import Taken
from workers.supervise import LeaseLostError, NotRecordedError, end

logger = logging.getLogger(__name__)

MAX_LIVE_MERGES = 1
MAX_LIVE_CHATS = 2

_Row = TypeVar("_Row", bound=JobRow)


@app.task(name="workers.tasks.train")
def train() -> None:
    """Train queued Runs that fit this machine, one after the other, until none is left."""
    here = shop()
    while (claimed := claim_run(here)) is not None:
        row, taken = claimed
        with taken:
            here.bells.ring(Bell.TRAIN)  # for the next Run, and the next card
            _guarded(here, row, partial(training.train, taken=taken))


@app.task(name="workers.tasks.merge")
def merge() -> None:
    """Execute queued Merges, one after the other, until none is left."""
    here = shop()
    while (row := _claim(here, ArtifactRow, MAX_LIVE_MERGES)) is not None:
        _guarded(here, row, orders.merge)


@app.task(name="workers.tasks.serve")
def serve() -> None:
    """Serve one queued Chat until it is closed or nobody has used it for a while."""
    here = shop()
    row = _claim(here, ChatRow, MAX_LIVE_CHATS)
    if row is not None:
        _guarded(here, row, orders.serve)


def claim_run(here: Shop) -> tuple[RunRow, Taken] | None:
    """Claim the first Run that fits this machine now, and lock its slots.

    Returns:
        The Run and its slots; None when there is nothing to do or no slot is free.
    """
    with here.database.read() as session:
        ready = queue.ready(session)
    if not ready:
        return None  # most bells: do not ask the driver for its cards
    cards, cpu_is_free = here.slots.cards(), here.slots.cpu_is_free()
    locked: list[Taken] = []

    def look(row: RunRow) -> Placement:
        return place(queue.need_of(row), cards, cpu_is_free=cpu_is_free)

    if not any(look(row).fits for row in ready):
        return None  # do not keep others from writing while all that wait are looked at

    def fit(row: RunRow) -> Placement:
        nonlocal cards, cpu_is_free
        while (found := look(row)).fits:
            taken = here.slots.take(found, row.id)
            if taken is not None:
                locked.append(taken)
                break
            # Another worker was faster: perhaps there are other cards.
            lost = [card.uuid for card in found.cards]
            cards = [
                c.model_copy(update={"is_taken": True}) if c.uuid in lost else c for c in cards
            ]
            cpu_is_free = cpu_is_free and bool(lost)
        return found

    claimed = None
    try:
        with here.database.write() as session:
            if not here.refusing.is_set():
                claimed = queue.claim(session, here.holder, fit)
    except BaseException:
        for taken in locked:
            taken.close()
        raise
    return None if claimed is None else (claimed[0], locked[0])


def _claim(here: Shop, table: type[_Row], max_live: int) -> _Row | None:
    with here.database.write() as session:
        if here.refusing.is_set():
            return None
        return leases.claim(session, table, holder=here.holder, max_live=max_live)


def _guarded(here: Shop, row: _Row, work: Callable[[Shop, _Row], None]) -> None:
    """Run a task; whatever goes wrong is written on the row, in words."""
    lease = leases.lease_of(row)
    try:
        work(here, row)
    except LeaseLostError:
        logger.warning("%s was lost: nothing is done any more", lease.mark)
    except NotRecordedError:
        # It is no failure of the work: the reconciler reads how it had ended.
        logger.exception("the end of %s could not be recorded", lease.mark)
    except StudioError as error:
        _fail(here, lease, _words(error))
    except Exception as error:
        logger.exception("%s failed", lease.mark)
        _fail(
            here,
            lease,
            {
                "type": type(error).__name__,
                "message": f"The worker failed: {error}.",
                "hint": "This is a fault of the studio; worker.log in the home folder has more.",
            },
        )
        raise


def _words(error: StudioError) -> dict[str, str]:
    return {
        "type": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "field": error.field,
    }


def _fail(here: Shop, lease: leases.Lease, words: dict[str, Any]) -> None:
    end(here, lease, RunState.FAILED, {"error": words, "stage": ""})
