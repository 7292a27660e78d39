"""`studio queue ...`: list, pause, resume, move, priority, hold, release, start-after."""

from typing import Annotated, Any

import typer

from studio import terminal
from studio.domain.moment import parse_moment
from studio.errors import InputError
from studio.options import HomeOption, JsonOption, RunArgument, studio_of
from studio.services import queue, waiting
from studio.services.studio import Studio
from studio.services.waiting import Machine, Overview
from studio.terminal import out, say_json

queue_app = typer.Typer(
    help="See what waits and why, and change the order.", invoke_without_command=True
)


@queue_app.callback()
def list_all(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the runs that wait with the reason, and what the workers do."""
    if context.invoked_subcommand is not None:
        return
    _say(studio_of(home), as_json)


@queue_app.command("pause")
def pause(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Start no run until `studio queue resume`; what runs goes on."""
    studio = studio_of(home)
    queue.pause(studio, True)
    _say(studio, as_json)


@queue_app.command("resume")
def resume(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Start runs again."""
    studio = studio_of(home)
    queue.pause(studio, False)
    _say(studio, as_json)


@queue_app.command("move")
def move(
    run_id: RunArgument,
    first: Annotated[bool, typer.Option("--first", help="Before all others.")] = False,
    before: Annotated[
        int | None, typer.Option("--before", help="Right before this run.", min=1)
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a run another place; where needed it takes the priority of its new neighbours."""
    studio = studio_of(home)
    if first == (before is not None):
        raise InputError("Say where the run shall stand.", "Give --first, or --before RUN.")
    if before is None:
        queue.move_first(studio, run_id)
    else:
        queue.move_before(studio, run_id, before)
    _say(studio, as_json)


# A negative number is no option.
@queue_app.command("priority", context_settings={"ignore_unknown_options": True})
def priority(
    run_id: RunArgument,
    value: Annotated[int, typer.Argument(metavar="N", help="-100 to 100; higher starts first.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a run a priority; those of a higher one start first."""
    studio = studio_of(home)
    queue.set_priority(studio, run_id, value)
    _say(studio, as_json)


@queue_app.command("hold")
def hold(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Keep a queued run from starting."""
    studio = studio_of(home)
    queue.hold(studio, run_id)
    _say(studio, as_json)


@queue_app.command("release")
def release(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Let a paused run go on."""
    studio = studio_of(home)
    queue.release(studio, run_id)
    _say(studio, as_json)


@queue_app.command("start-after")
def start_after(
    run_id: RunArgument,
    moment: Annotated[
        str, typer.Argument(metavar="[TIME]", help="22:00, 2031-05-17 22:00, or +8h.")
    ] = "",
    run: Annotated[
        int | None, typer.Option("--run", help="Only when this run has finished.", min=1)
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="As soon as it can.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a run start no earlier than a moment, or when another one has finished."""
    studio = studio_of(home)
    if clear == (bool(moment) or run is not None):
        raise InputError("Say when the run may start.", "Give a TIME, --run RUN, or --clear.")
    if moment:
        queue.start_after(studio, run_id, parse_moment(moment))
    if run is not None:
        queue.wait_for(studio, run_id, run)
    if clear:
        queue.start_after(studio, run_id, None)
        queue.wait_for(studio, run_id, None)
    _say(studio, as_json)


def _say(studio: Studio, as_json: bool) -> None:
    found = waiting.overview(studio)
    if as_json:
        say_json(_values(studio, found))
        return
    if found.is_paused:
        out.print("the queue is paused: no run is started")
    if found.waiting:
        rows = [(one.row.id, one.row.priority, one.row.name, one.why) for one in found.waiting]
        terminal.show_table(("run", "priority", "name", "waits because"), rows)
    else:
        out.print("no run waits")
    for machine in found.machines:
        works = ", ".join(machine.works) or "waits for work"
        closing = ", takes no more" if machine.is_closing else ""
        out.print(f"worker {machine.name}: {_cards(machine)}, {works}{closing}", markup=False)


def _cards(machine: Machine) -> str:
    if not machine.cards:
        return "CPU"
    busy = sum(card.is_taken for card in machine.cards)
    things = "GPU" if len(machine.cards) == 1 else "GPUs"
    return f"{len(machine.cards)} {things}, {busy} in use"


def _values(studio: Studio, found: Overview) -> dict[str, Any]:
    return {
        "is_paused": found.is_paused,
        "waiting": [
            {**terminal.run_values(studio, one.row), "why": one.why} for one in found.waiting
        ],
        "workers": [
            {
                "name": machine.name,
                "host": machine.host,
                "version": machine.version,
                "is_closing": machine.is_closing,
                "works": list(machine.works),
                "cards": [card.model_dump(mode="json") for card in machine.cards],
            }
            for machine in found.machines
        ],
    }
