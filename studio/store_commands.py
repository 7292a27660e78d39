"""`studio backup` and `studio restore`: copies of the database."""

from typing import Annotated

import typer

from studio.disk import Home
from studio.errors import ConflictError
from studio.options import HomeOption, JsonOption, settings_of, studio_of
from studio.store import backup as backups
from studio.store import server
from studio.store.restore import Restored
from studio.store.restore import restore as put_back
from studio.terminal import out, say_json


def backup(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Copy the database into the folder backups; the newest 7 copies are kept."""
    copy = backups.backup(studio_of(home).database, "by hand")
    if as_json:
        manifest = copy.manifest.model_dump(mode="json") if copy.manifest else {}
        say_json({"path": str(copy.path), **manifest})
    else:
        out.print(f"{copy.path}", markup=False, soft_wrap=True)


def restore(
    name: Annotated[str, typer.Argument(help="Name of a copy in the folder backups, or a path.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a copy of the database in its place; what was there is kept aside."""
    settings = settings_of(home)
    if settings.database_url:
        message, hint = backups.NOT_OF_A_SERVER
        address = server.address_of(server.parse_url(settings.database_url))
        raise ConflictError(message.format(address=address), hint)
    done = put_back(Home(path=settings.resolved_home()), name)
    if as_json:
        values = {"name": done.copy.name, "folders_aside": done.num_folders}
        say_json({**values, "aside": str(done.aside) if done.aside else None})
    else:
        out.print(_words(done), markup=False, soft_wrap=True)


def _words(done: Restored) -> str:
    words = f"{done.copy.name} is in place."
    if done.aside is not None:
        words += f" What was there is in {done.aside}"
        if done.num_folders:
            words += f", with {done.num_folders} runs, merges and chats that the copy does not know"
        words += "."
    return words
