"""The Celery app of the workers. `configure` gives it a home folder before it starts."""

from dataclasses import dataclass, field
from functools import cache
from threading import Event

from celery import Celery

from studio.disk import Home
from studio.dispatch import celery_settings
from studio.settings import Settings
from studio.store.database import Database

app = Celery("workers", include=["workers.tasks"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Shop:
    """What every task needs at hand.

    Attributes:
        owner: Name of this worker process in Leases.
        closing: Set when the worker was asked to end.
        refusing: Set when the worker takes no more work.
    """

    home: Home
    database: Database
    settings: Settings
    owner: str
    closing: Event = field(default_factory=Event)
    refusing: Event = field(default_factory=Event)


def configure(shop: Shop) -> None:
    """Give the app its broker and its home folder."""
    app.conf.update(celery_settings(shop.home))
    _shops()["shop"] = shop


def shop() -> Shop:
    """Return what `configure` was given.

    Raises:
        KeyError: `configure` was not called in this process.
    """
    return _shops()["shop"]


@cache
def _shops() -> dict[str, Shop]:
    return {}
