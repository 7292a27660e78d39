"""Bring a database to a version of the schema, in one transaction that all others wait for."""

import logging
from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from studio.errors import MachineError

MIGRATIONS = Path(__file__).parent / "migrations"

logger = logging.getLogger(__name__)


def known_revisions() -> list[str]:
    """Return the versions of the schema that this studio knows, oldest first."""
    return [script.revision for script in _scripts().walk_revisions()][::-1]


def present_revision(connection: Connection) -> str | None:
    """Return the version of a database; None when it has no tables yet."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(
    writer: Engine,
    reader: Engine,
    where: str,
    *,
    when_empty: Callable[[], None],
    keep: Callable[[str], object],
) -> None:
    """Bring a database to the newest version.

    Args:
        writer: Its transactions wait for each other, and its statements that change tables belong
            to them: a process that is killed in the middle leaves the old version.
        reader: Its transactions wait for nobody.
        where: The database, for people.
        when_empty: Called when it has no tables, before any is made; may refuse.
        keep: Called with a reason when it is older, before anything is changed.

    Raises:
        MachineError: The database is newer than this studio.
    """
    known = known_revisions()
    with reader.connect() as connection:
        present = present_revision(connection)
    if present == known[-1]:
        return
    if present is None:
        when_empty()
    elif present not in known:
        raise MachineError(
            f"The database {where} is from a newer Delta Studio (schema {present}); this one "
            f"knows schemas up to {known[-1]}.",
            "Start that version, or choose another home folder with --home DIR.",
        )
    else:
        logger.info("%s goes from schema %s to %s", where, present, known[-1])
        keep(f"before schema {known[-1]}")
    with writer.begin() as connection:
        # Another machine may have been faster; then there is nothing left to do.
        move(connection, known[-1])
        refuse_loose_ends(connection)


def move(connection: Connection, revision: str) -> None:
    """Take all steps up or down to a version; `base` is a database without tables."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = ["base", *known_revisions()]
    is_down = known.index(revision) < known.index(present_revision(connection) or "base")
    (command.downgrade if is_down else command.upgrade)(config, revision)


def refuse_loose_ends(connection: Connection) -> None:
    """See that no row names one that is not there; PostgreSQL sees that by itself.

    Raises:
        MachineError: One does, so that the transaction is taken back.
    """
    if connection.dialect.name != "sqlite":
        return
    loose = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
    if loose is not None:
        raise MachineError(
            f"Row {loose[1]} of the table {loose[0]} names a row of {loose[2]} that is not there.",
            "Nothing was changed; put a backup in place with `studio restore`.",
        )


def _scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return ScriptDirectory.from_config(config)
