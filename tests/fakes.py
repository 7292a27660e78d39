"""Fakes of the two seams of the project: the door to Celery, and nothing else."""

from pathlib import Path

from studio.disk import Home
from studio.dispatch import Bell
from studio.files import Files
from studio.services.studio import Studio
from studio.settings import Settings
from studio.store import leases
from studio.store.database import Database
from studio.store.rows import ArtifactRow, ChatRow, JobRow, RunRow
from studio.tokens.sandbox import Inspector


class FakeDispatch:
    """Records bells, and looks into the database as a worker would when it hears one.

    A verb that rings before its row is committed is caught: the second connection does not see
    the row.
    """

    def __init__(self, database: Database) -> None:
        self.rung: list[Bell] = []
        self.waiting_when_rung: list[int] = []
        self._database = database

    def ring(self, bell: Bell) -> None:
        """Record a bell and how many rows wait at that moment."""
        tables: dict[Bell, type[JobRow]] = {
            Bell.TRAIN: RunRow,
            Bell.MERGE: ArtifactRow,
            Bell.SERVE: ChatRow,
        }
        other = Database(self._database.path, self._database.url)
        with other.read() as session:
            self.waiting_when_rung.append(leases.queued(session, tables[bell]))
        other.close()
        self.rung.append(bell)


def make_home(folder: Path, verdicts: Path | None = None) -> Home:
    """Return a home folder.

    Args:
        folder: Where it is.
        verdicts: What it shares with other homes: which tokenizers have a fast path.
    """
    home = Home(path=folder)
    if verdicts is not None:
        home.tokens.mkdir(parents=True)
        home.verdicts.symlink_to(verdicts, target_is_directory=True)
    home.create()
    return home


def make_studio(home_folder: Path, verdicts: Path | None = None) -> Studio:
    """Return an installation in a folder, with a fake door to Celery."""
    home = make_home(home_folder, verdicts)
    database = Database(home.database)
    return Studio(
        home=home,
        database=database,
        dispatch=FakeDispatch(database),
        settings=Settings(home=home_folder),
        inspector=Inspector(home.verdicts),
        files=Files(home),
    )
