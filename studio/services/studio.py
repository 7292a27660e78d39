"""What every verb needs at hand: home folder, database, the doors to the workers and the inspector."""

from dataclasses import dataclass
from pathlib import Path

from studio.disk import TEMPLATES, Home
from studio.dispatch import CeleryDispatch, Dispatch
from studio.domain.preset import KnownModel, Preset, load_models, load_presets
from studio.files import Files
from studio.settings import Settings
from studio.store.database import Database
from studio.tokens.sandbox import Inspector


@dataclass(frozen=True, kw_only=True, slots=True)
class Studio:
    """One installation, as the verbs see it."""

    home: Home
    database: Database
    dispatch: Dispatch
    settings: Settings
    inspector: Inspector
    files: Files
    templates: Path = TEMPLATES

    @property
    def presets(self) -> dict[str, Preset]:
        """All presets by name, in the order of the list."""
        return load_presets(self.templates / "presets")

    @property
    def models(self) -> dict[str, KnownModel]:
        """All models whose configuration is known, by id."""
        return load_models(self.templates / "models")


def open_studio(settings: Settings) -> Studio:
    """Open the home folder: create what is missing, bring the database to the newest schema.

    Raises:
        MachineError: The folder cannot be written, the disk is full, or the database is newer.
    """
    home = Home(path=settings.resolved_home())
    home.create()
    return Studio(
        home=home,
        database=Database(home.database, settings.database_url, may_be_new=settings.new_database),
        dispatch=CeleryDispatch(home, settings),
        settings=settings,
        inspector=Inspector(home.verdicts),
        files=Files(home, settings.files_url),
    )
