"""Options that all commands share, and how they open the home folder."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from studio.errors import InputError
from studio.services.studio import Studio, open_studio
from studio.settings import Settings

USER_ERROR, OUR_ERROR = 2, 1

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Folder of everything that the studio keeps.", show_default=False),
]
RunArgument = Annotated[int, typer.Argument(help="Number of the run.", min=1)]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait until it is over.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def settings_of(home: Path | None, **changes: Any) -> Settings:
    """Return the settings; an option that was not given leaves them to the environment.

    Raises:
        InputError: A STUDIO_ variable has a value that means nothing.
    """
    values = {name: value for name, value in {"home": home, **changes}.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = "STUDIO_" + "_".join(str(part) for part in first["loc"]).upper()
        words = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
        raise InputError(
            f"The setting {name} is wrong: {words}.", "Mend the variable, or unset it."
        ) from error


def studio_of(home: Path | None) -> Studio:
    """Open the home folder."""
    return open_studio(settings_of(home))
