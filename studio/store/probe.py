"""Whether SQLite can work in a folder: the kind of its mount, and a real try by two processes.

The write-ahead log needs memory that is shared by all processes, hence one machine: see
https://sqlite.org/wal.html. On some other file systems SQLite says that it is switched on and
fails at the first write.
"""

import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from studio.errors import MachineError

NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "afs", "ncpfs"}
)
# Known to do what SQLite needs: there, no start has to wait for a second process.
LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"})
TRY_SECONDS = 20.0
_READER = (
    "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=5); "
    "print(c.execute('SELECT sum(a) FROM t').fetchone()[0])"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A file system and where it is mounted."""

    point: str
    kind: str
    is_read_only: bool


def parse_mounts(text: str) -> list[Mount]:
    """Return the mounts of /proc/self/mountinfo (proc(5)), in its order."""
    mounts = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6:
            continue
        options = {*fields[5].split(","), *kinds[-1].split(",")}
        # Space, tab, line end and backslash are written in octal.
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        mounts.append(Mount(point=point, kind=kinds[0], is_read_only="ro" in options))
    return mounts


def mount_of(folder: Path, mounts: list[Mount]) -> Mount | None:
    """Return the mount that a folder lies on; of two at one place, the upper one."""
    best = None
    for mount in mounts:
        if not folder.is_relative_to(mount.point):
            continue
        if best is None or len(mount.point) >= len(best.point):
            best = mount
    return best


def find_mount(folder: Path) -> Mount | None:
    """Return the mount that a folder lies on; None where the system does not tell."""
    table = Path("/proc/self/mountinfo")
    if not table.exists():
        return None
    text = table.read_text(encoding="utf-8", errors="surrogateescape")
    return mount_of(folder.resolve(), parse_mounts(text))


def refuse_unfit(folder: Path, mount: Mount | None) -> None:
    """See that SQLite can work in a folder.

    Raises:
        MachineError: It is on a network file system, or a try failed.
    """
    if mount is not None and mount.kind in NETWORK:
        raise MachineError(
            f"The home folder {folder} is on a network file system ({mount.kind}, mounted at "
            f"{mount.point}), where SQLite loses or damages data.",
            "Choose a folder on a local disk with --home DIR, or set STUDIO_DATABASE_URL to a "
            "PostgreSQL database.",
        )
    if mount is None or mount.kind not in LOCAL:
        reason = try_folder(folder)
        if reason:
            kind = "" if mount is None else f" ({mount.kind}, mounted at {mount.point})"
            raise MachineError(
                f"SQLite does not work in the home folder {folder}{kind}: {reason}.",
                "Choose a folder on a local disk with --home DIR, or set STUDIO_DATABASE_URL to a "
                "PostgreSQL database.",
            )


def try_folder(folder: Path) -> str:
    """Use a small database in a folder: open, log, write, and let a second process read.

    Returns:
        What failed; empty when all worked. Nothing is left behind.
    """
    try:
        place = Path(tempfile.mkdtemp(dir=folder, prefix=".probe-"))
    except OSError as error:
        return f"no folder can be made ({error.strerror})"
    try:
        return _try_database(place / "probe.db")
    except sqlite3.Error as error:
        return str(error)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _try_database(path: Path) -> str:
    connection = sqlite3.connect(path, timeout=5, isolation_level=None)
    try:
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            return f"the write-ahead log cannot be switched on (it stays {mode})"
        connection.execute("CREATE TABLE t (a INTEGER)")
        connection.execute("INSERT INTO t VALUES (20), (22)")
        # The rows are in the log alone: whoever sees them shares this process's memory.
        command = [sys.executable, "-I", "-S", "-c", _READER, str(path)]
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TRY_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"a second process could not read within {TRY_SECONDS:g} s"
    finally:
        connection.close()
    if answer.stdout.strip() == "42":
        return ""
    said = answer.stderr.strip().splitlines()
    return f"a second process does not see what is written ({said[-1] if said else answer.stdout})"
