"""The only door to Celery: rings a bell, carries no truth.

The row is the truth; a message only says "look, there may be work". It may be lost, doubled or
late without harm, because workers also look by themselves.
"""

import logging
import ssl
from enum import StrEnum
from typing import Any, Protocol
from urllib.parse import urlsplit

from celery import Celery
from kombu.exceptions import OperationalError

from studio.broker import TRANSPORT
from studio.disk import Home
from studio.settings import Settings

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 0.8  # of one who rings, with a Redis that does not answer


class Bell(StrEnum):
    """Kinds of work, by the name of the task that looks for it."""

    TRAIN = "workers.tasks.train"
    MERGE = "workers.tasks.merge"
    SERVE = "workers.tasks.serve"


class Dispatch(Protocol):
    """Whoever can wake a worker."""

    def ring(self, bell: Bell) -> None:
        """Say that there may be work. Never raises: a lost bell only delays."""


def celery_settings(home: Home, settings: Settings | None = None) -> dict[str, Any]:
    """Return Celery's settings, shared by sender and worker.

    Without a broker_url the broker is a folder that only its owner reads, and no server: see
    studio.broker. Acknowledgement is early, since the row and not the message says what is left
    to do; so a Redis that delivers what was not acknowledged a second time has nothing to deliver,
    however long a run takes.
    """
    url = settings.broker_url if settings is not None else ""
    return {
        **(_redis(url) if url else _folder(home)),
        "task_acks_late": False,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "worker_prefetch_multiplier": 1,
        "worker_send_task_events": False,
        "worker_enable_remote_control": False,  # nobody asks; bells are the only messages
        "worker_hijack_root_logger": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # the default ends a worker after 100
    }


def _folder(home: Home) -> dict[str, Any]:
    return {
        "broker_url": "folder://localhost",
        "broker_transport": TRANSPORT,
        "broker_transport_options": {"folder": str(home.broker), "polling_interval": 0.1},
    }


def _redis(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    chosen: dict[str, Any] = {
        "broker_url": url,
        # Without these a network that swallows packets would hold a worker for ever.
        "broker_transport_options": {
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
        },
    }
    if parts.scheme == "rediss" and "ssl_" not in parts.query:
        # kombu 5.7 believes any certificate of a rediss:// that does not say whom it trusts.
        chosen["broker_use_ssl"] = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    return chosen


class CeleryDispatch:
    """Rings through Celery's broker."""

    def __init__(self, home: Home, settings: Settings | None = None) -> None:
        self._app = Celery("studio", set_as_current=False)
        self._app.conf.update(celery_settings(home, settings))
        # Whoever rings does not wait: the next look of a worker makes good for a lost bell.
        self._app.conf.task_publish_retry = False
        self._app.conf.broker_transport_options |= {
            "socket_timeout": PATIENCE_SECONDS,
            "socket_connect_timeout": PATIENCE_SECONDS,
            "max_retries": 0,
        }
        self._is_out = False

    def ring(self, bell: Bell) -> None:
        """Send one message; a broker that fails is logged, the worker will look by itself.

        An outage is logged once, at its first lost bell.
        """
        try:
            self._app.send_task(bell.value, ignore_result=True)
        except (OperationalError, OSError) as error:
            if not self._is_out:
                logger.warning("the bell %s was not rung: %s", bell.name, error)
            self._is_out = True
        else:
            if self._is_out:
                logger.warning("the broker is there again: the bell %s was rung", bell.name)
            self._is_out = False
