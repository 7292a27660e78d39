"""Files that other machines need from here, and that they have made; nothing is done without a store.

With STUDIO_FILES_URL the page's home folder is not the workers': what a Run reads is offered when
it is launched, what it writes is fetched when somebody looks.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from studio.domain.spec import JobSpec
from studio.errors import MachineError
from studio.services.studio import Studio

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_SECONDS = 3.0
_with_result: set[tuple[str, int]] = set()
_looked: dict[tuple[str, int], float] = {}
_lock = threading.Lock()


def offer_datasets(studio: Studio, spec: JobSpec) -> None:
    """Copy the Datasets of a Run to where its worker fetches them.

    Raises:
        MachineError: The store cannot be written.
    """
    data = spec.data
    named = [data.dataset, *(part.dataset for part in data.mixture)]
    named += [data.eval_dataset] if data.eval_dataset else []
    for sha256 in named:
        studio.files.push(studio.home.dataset(sha256), studio.home.dataset_index(sha256))


def offer_run(studio: Studio, run_id: int) -> None:
    """Copy the folder of a Run that begins with something: a fork.

    Raises:
        MachineError: The store cannot be written.
    """
    studio.files.push(studio.home.run(run_id).path)


def fetch_reports(studio: Studio, run_id: int) -> None:
    """Bring what a Run tells, at most every three seconds: no weights."""
    if _is_due(studio, "reports", run_id):
        _quietly(lambda: studio.files.pull(studio.home.run(run_id).path, is_flat=True))


def fetch_checkpoints(studio: Studio, run_id: int) -> None:
    """Bring the Checkpoints of a Run."""
    if _is_due(studio, "checkpoints", run_id):
        _quietly(lambda: studio.files.pull(studio.home.run(run_id).checkpoints))


def has_result(studio: Studio, run_id: int) -> bool:
    """Tell whether a Run has left an Adapter or a whole model, here or where its worker put it."""
    folder = studio.home.run(run_id)
    if folder.adapter.is_dir() or folder.model.is_dir():
        return True
    if not _is_due(studio, "result", run_id):
        return (str(studio.home.path), run_id) in _with_result
    if _quietly(lambda: studio.files.has(folder.adapter) or studio.files.has(folder.model)):
        _with_result.add((str(studio.home.path), run_id))
        return True
    return False


def _quietly(ask: Callable[[], T]) -> T | None:
    """Look into the store; while it cannot be reached, what is here is shown."""
    try:
        return ask()
    except MachineError as error:
        logger.warning("%s", error)
        return None


def _is_due(studio: Studio, what: str, run_id: int) -> bool:
    if not studio.files.is_on:
        return False
    key, now = (f"{studio.home.path} {what}", run_id), time.monotonic()
    with _lock:
        if now - _looked.get(key, -LOOK_SECONDS) < LOOK_SECONDS:
            return False
        _looked[key] = now
    return True
