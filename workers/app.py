"""The Celery app of the workers. `configure` gives it a home folder before it starts."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Event

from celery import Celery

from studio.disk import Home
from studio.dispatch import CeleryDispatch, Dispatch, celery_settings
from studio.files import Files
from studio.settings import Settings
from studio.store.clock import Holder, holder
from studio.store.database import Database
from workers.launcher import trainer_command
from workers.slots import Slots

Command = Callable[[Path, int], list[str]]

app = Celery("workers", include=["workers.tasks"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Shop:
    """What every task needs at hand.

    Attributes:
        holder: This worker process in Leases.
        slots: The cards of this machine.
        files: The way to machines that share no folder with this one.
        bells: Wakes all workers, this one too.
        command: Makes the command of a Run from its folder and its number of cards.
        started_at: Seconds since 1970.
        closing: Set when the worker was asked to end.
        refusing: Set when the worker takes no more work.
    """

    home: Home
    database: Database
    settings: Settings
    holder: Holder
    slots: Slots
    files: Files
    bells: Dispatch
    command: Command = trainer_command
    started_at: float = field(default_factory=time.time)
    closing: Event = field(default_factory=Event)
    refusing: Event = field(default_factory=Event)

    @property
    def owner(self) -> str:
        """Name of this worker process."""
        return self.holder.name


def open_shop(
    home: Home, settings: Settings, name: str, *, command: Command = trainer_command
) -> Shop:
    """Return what a worker of this machine needs.

    Args:
        home: The home folder; it is there.
        settings: Of this installation.
        name: Of the worker, unique on all machines.
        command: Makes the command of a Run from its folder and its number of cards.

    Raises:
        MachineError: The database cannot be opened.
    """
    return Shop(
        home=home,
        database=Database(home.database, settings.database_url, may_be_new=settings.new_database),
        settings=settings,
        holder=holder(name),
        slots=Slots(home, name),
        files=Files(home, settings.files_url),
        bells=CeleryDispatch(home, settings),
        command=command,
    )


def configure(shop: Shop) -> None:
    """Give the app its broker and its home folder."""
    app.conf.update(celery_settings(shop.home, shop.settings))
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
