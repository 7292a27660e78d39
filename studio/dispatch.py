"""The only door to Celery: rings a bell, carries no truth.

The row is the truth; a message only says "look, there may be work". It may be lost, doubled or
late without harm, because workers also look by themselves.
"""

import logging
from enum import StrEnum
from typing import Any, Protocol

from celery import Celery
from kombu.exceptions import OperationalError

from studio.broker import TRANSPORT
from studio.disk import Home

logger = logging.getLogger(__name__)


class Bell(StrEnum):
    """Kinds of work, by the name of the task that looks for it."""

    TRAIN = "workers.tasks.train"
    MERGE = "workers.tasks.merge"
    SERVE = "workers.tasks.serve"


class Dispatch(Protocol):
    """Whoever can wake a worker."""

    def ring(self, bell: Bell) -> None:
        """Say that there may be work. Never raises: a lost bell only delays."""


def celery_settings(home: Home) -> dict[str, Any]:
    """Return Celery's settings for the embedded broker, shared by sender and worker.

    The transport is a folder that only its owner reads, and no server: see studio.broker.
    Acknowledgement is early, since the row and not the message says what is left to do.
    """
    queue = str(home.broker / "queue")
    return {
        "broker_url": "filesystem://localhost",
        "broker_transport": TRANSPORT,
        "broker_transport_options": {
            "data_folder_in": queue,
            "data_folder_out": queue,
            "control_folder": str(home.broker / "control"),
            "store_processed": False,
            "polling_interval": 0.1,
        },
        "task_acks_late": False,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "worker_prefetch_multiplier": 1,
        "worker_send_task_events": False,
        "worker_enable_remote_control": False,  # nobody asks; bells are the only messages
        "worker_hijack_root_logger": False,
        "broker_connection_retry_on_startup": True,
    }


class CeleryDispatch:
    """Rings through Celery's broker."""

    def __init__(self, home: Home) -> None:
        self._app = Celery("studio", set_as_current=False)
        self._app.conf.update(celery_settings(home))

    def ring(self, bell: Bell) -> None:
        """Send one message; a broker that fails is logged, the worker will look by itself."""
        try:
            self._app.send_task(bell.value, ignore_result=True)
        except (OperationalError, OSError) as error:
            logger.warning("the bell %s was not rung: %s", bell.name, error)
