"""The clock that Leases are measured with: one that nobody can set.

On one machine (SQLite) it counts the seconds since the machine was started, sleep included, and
means nothing after a restart: hence the boot id beside each Lease. Several machines share no such
clock; there (PostgreSQL) the server's own clock is asked.
"""

import socket
import time
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.orm import Session

from studio.store.dialects import is_sqlite

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A worker that may hold Leases.

    Attributes:
        name: Unique on all machines.
        host: Name of its machine, for people.
        boot_id: Of the running system: processes and locks of the same one can be looked at.
    """

    name: str
    host: str
    boot_id: str


def lease_now(session: Session) -> float:
    """Return the seconds on the clock of Leases."""
    if is_sqlite(session):
        return _since_boot()
    return float(session.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


def is_of_one_machine(session: Session) -> bool:
    """Tell whether all that use the database run on one machine, as SQLite demands."""
    return is_sqlite(session)


@cache
def boot_id() -> str:
    """Return the id of the running system; it changes when the machine is started again."""
    if _BOOT_ID.exists():
        return _BOOT_ID.read_text(encoding="ascii").strip()
    # Where the kernel has none, the moment of the start tells systems apart.
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{round(time.time() - _since_boot(), -2):.0f}"))


def holder(name: str) -> Holder:
    """Return a worker of this machine."""
    return Holder(name=name, host=socket.gethostname(), boot_id=boot_id())


def _since_boot() -> float:
    # macOS has no CLOCK_BOOTTIME; its monotonic clock stands still while the machine sleeps.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
