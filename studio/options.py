"""Options that all commands share, and how they open the home folder."""

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.services.studio import Studio, open_studio
from studio.settings import Settings

USER_ERROR, OUR_ERROR = 2, 1

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Folder of everything that the studio keeps.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def settings_of(home: Path | None, **changes: Any) -> Settings:
    """Return the settings; an option that was not given leaves them to the environment."""
    values = {name: value for name, value in {"home": home, **changes}.items() if value is not None}
    return Settings(**values)


def studio_of(home: Path | None) -> Studio:
    """Open the home folder."""
    return open_studio(settings_of(home))
