"""What the doctor finds out about the database; nothing of it is changed."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

from studio.disk import Home
from studio.domain.section import Section
from studio.errors import StudioError
from studio.store import migrate, probe, server
from studio.store.copies import age_words, listing
from studio.store.database import Database

OLD_BACKUP_HOURS = 48.0


class Finding(Section):
    """One line of the examination; `good` is None where nothing is judged."""

    name: str
    good: bool | None
    text: str


def examine_store(database: Database) -> list[Finding]:
    """Look at the database and at where it lies."""
    try:
        with database.read() as session:
            revision = migrate.present_revision(session.connection())
            if database.dialect == "postgresql":
                version = server.version_of(session.connection())
    except StudioError as error:
        return [Finding(name="database", good=False, text=str(error))]
    schema = Finding(name="schema", good=True, text=f"version {revision}")
    if database.dialect == "postgresql":
        text = f"PostgreSQL {version}, {database.address}; copy it with pg_dump"
        return [Finding(name="database", good=True, text=text), schema]
    return [_file(database.path), schema, _mount(database.path.parent), _backup(database.path)]


def _file(path: Path) -> Finding:
    uri = f"{path.resolve().as_uri()}?mode=ro"
    began = time.monotonic()
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        return Finding(name="database", good=False, text=f"{path}: {error}")
    text = (
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB, journal {mode}, quick_check {found} in "
        f"{time.monotonic() - began:.1f} s"
    )
    return Finding(name="database", good=mode == "wal" and found == "ok", text=text)


def _mount(folder: Path) -> Finding:
    mount = probe.find_mount(folder)
    kind = "unknown" if mount is None else f"{mount.kind}, mounted at {mount.point}"
    try:
        probe.refuse_unfit(folder, mount)
    except StudioError as error:
        return Finding(name="file system", good=False, text=error.message)
    reason = probe.try_folder(folder)
    if reason:
        return Finding(name="file system", good=False, text=f"{kind}: {reason}")
    return Finding(name="file system", good=True, text=f"{kind}; two processes share a database")


def _backup(path: Path) -> Finding:
    found = listing(Home(path=path.parent).backups)
    if not found:
        text = "none yet; the worker makes one each day, `studio backup` makes one now"
        return Finding(name="backup", good=None, text=text)
    hours = (time.time() - found[0].made_at) / 3600
    text = f"{found[0].name}, {age_words(hours)}; {len(found)} are kept"
    return Finding(name="backup", good=True if hours < OLD_BACKUP_HOURS else None, text=text)
