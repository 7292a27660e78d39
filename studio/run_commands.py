"""`studio run`, `runs`, `show`, `stop`, `pause`, `resume`, `save-now`, `fork` and what else acts on Runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from studio import terminal
from studio.domain.fork import Keep
from studio.domain.moment import moment_words, parse_moment
from studio.domain.preset import merge_values
from studio.domain.spec import yaml_mapping
from studio.domain.spec_diff import Change
from studio.errors import ConflictError, InputError, MachineError, NotFoundError
from studio.options import (
    OUR_ERROR,
    USER_ERROR,
    HomeOption,
    JsonOption,
    RunArgument,
    WaitOption,
    studio_of,
)
from studio.services import checkpoints as saved
from studio.services import forks, run_files, runs, workers
from studio.services.queue import Order
from studio.services.studio import Studio
from studio.store.rows import RunRow
from studio.terminal import err, out, say_json

# Failures of a process that the user can mend; an EngineError is one where it names a field.
_OF_THE_USER = tuple(
    kind.__name__ for kind in (InputError, NotFoundError, ConflictError, MachineError)
)

ChangesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A field of the new spec as FIELD=VALUE, as in optim.learning_rate=1e-5, "
        "name=second, train.max_steps=null or lora.targets=[attention]; may be repeated.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Give the command line the commands of this file."""
    for command in (
        run,
        show,
        stop,
        pause,
        resume,
        save_now,
        evaluate_now,
        fork,
        clone,
        diff,
        checkpoints,
        history,
    ):
        app.command(command.__name__.replace("_", "-"))(command)
    app.command("runs")(list_runs)


def run(
    spec_file: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="JobSpec as YAML.")],
    wait: WaitOption = False,
    priority: Annotated[int, typer.Option(help="-100 to 100; higher starts first.")] = 0,
    start_after: Annotated[
        str, typer.Option(help="No earlier than 22:00, 2031-05-17 22:00, or +8h.")
    ] = "",
    after: Annotated[
        int | None, typer.Option(help="Only when this run has finished.", min=1)
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Launch a training run from a spec; `preset: NAME` alone fills in the rest."""
    studio = studio_of(home)
    moment = parse_moment(start_after) if start_after else None
    order = Order(priority=priority, start_after=moment, after_run_id=after)
    row = runs.submit(studio, runs.spec_from_file(studio, spec_file), order)
    _follow(studio, row, wait=wait, as_json=as_json)


def list_runs(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the newest runs."""
    studio = studio_of(home)
    rows = runs.listing(studio)
    if as_json:
        say_json([terminal.run_values(studio, row) for row in rows])
    else:
        terminal.show_table(
            ("run", "state", "step", "name"),
            [(r.id, runs.state_of(r), f"{r.step}/{r.total_steps or '-'}", r.name) for r in rows],
        )


def show(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show one run with its proofs."""
    studio = studio_of(home)
    row = runs.get(studio, run_id)
    values = terminal.run_values(studio, row)
    proofs = run_files.proofs(studio, run_id).proofs
    if as_json:
        say_json({**values, "proofs": [p.model_dump(mode="json") for p in proofs]})
        return
    failure = terminal.failure_of(row)
    fields = {k: v for k, v in values.items() if k not in ("error", "result") and v is not None}
    if failure is not None:
        fields["error"] = " ".join(failure)
    marks = {True: "passed", False: "FAILED", None: "noted"}
    fields |= {f"proof {p.name}": f"{marks[p.passed]}: {p.summary}" for p in proofs}
    terminal.show_fields(fields)


def stop(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Stop a run; it saves its adapter at the next step boundary."""
    studio = studio_of(home)
    _say(studio, runs.stop(studio, run_id), as_json)


def pause(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Let a run save itself and wait in the queue until it is resumed; its cards are free."""
    studio = studio_of(home)
    _say(studio, runs.pause(studio, run_id), as_json)


def resume(
    run_id: RunArgument,
    wait: WaitOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a paused, stopped or failed run from its latest checkpoint."""
    studio = studio_of(home)
    _follow(studio, runs.resume(studio, run_id), wait=wait, as_json=as_json)


def save_now(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Ask a running run for a checkpoint at its next step."""
    studio = studio_of(home)
    _say(studio, runs.save_now(studio, run_id), as_json, "saves a checkpoint at its next step")


def evaluate_now(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Ask a running run for an evaluation at its next step."""
    studio = studio_of(home)
    _say(studio, runs.evaluate_now(studio, run_id), as_json, "evaluates at its next step")


def fork(
    run_id: RunArgument,
    step: Annotated[int, typer.Option(help="Step of the checkpoint that it begins from.", min=1)],
    changes: ChangesOption = None,
    keep: Annotated[
        Keep, typer.Option(help="everything goes on at that step; weights begins at step 0.")
    ] = Keep.EVERYTHING,
    wait: WaitOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Launch a new run from a checkpoint of another one, with what --set changes."""
    studio = studio_of(home)
    spec = forks.changed_spec(studio, run_id, parse_changes(changes or []))
    before = runs.spec_of(runs.get(studio, run_id))
    row = forks.fork(studio, run_id, step, spec, keep=keep)
    if not as_json:
        _show_differences(forks.differences(studio, before, runs.spec_of(row)))
    _follow(studio, row, wait=wait, as_json=as_json)


def clone(
    run_id: RunArgument,
    changes: ChangesOption = None,
    wait: WaitOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Launch a run with the spec of another one, and what --set changes."""
    studio = studio_of(home)
    spec = forks.changed_spec(studio, run_id, parse_changes(changes or []))
    before = runs.spec_of(runs.get(studio, run_id))
    row = runs.submit(studio, spec)
    if not as_json:
        _show_differences(forks.differences(studio, before, runs.spec_of(row)))
    _follow(studio, row, wait=wait, as_json=as_json)


def diff(
    run_id: RunArgument,
    other_id: Annotated[
        int | None, typer.Argument(metavar="[OTHER]", help="Number of another run.", min=1)
    ] = None,
    changes: ChangesOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is different between two runs, or what --set would change of one."""
    studio = studio_of(home)
    before = runs.spec_of(runs.get(studio, run_id))
    number = run_id if other_id is None else other_id
    after = forks.changed_spec(studio, number, parse_changes(changes or []))
    found = forks.differences(studio, before, after)
    if as_json:
        say_json([{"field": c.key, "title": c.title, "old": c.old, "new": c.new} for c in found])
    else:
        _show_differences(found)


def checkpoints(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the checkpoints of a run; the best one by evaluation loss has a star."""
    found = saved.listing(studio_of(home), run_id)
    if as_json:
        say_json(
            [
                {
                    "step": one.step,
                    "size_bytes": one.size_bytes,
                    "saved_at": one.saved_at,
                    "evaluation_loss": one.evaluation_loss,
                    "is_best": one.is_best,
                    "folder": str(one.folder),
                }
                for one in found
            ]
        )
        return
    rows = [
        (
            one.step,
            f"{one.size_bytes / 2**20:.1f}",
            "-" if one.evaluation_loss is None else f"{one.evaluation_loss:.4f}",
            moment_words(one.saved_at),
            "*" if one.is_best else "",
        )
        for one in found
    ]
    terminal.show_table(("step", "MiB", "evaluation loss", "saved", "best"), rows)


def history(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Say what happened to a run."""
    found = runs.history(studio_of(home), run_id)
    if as_json:
        say_json([{"at": e.at, "epoch": e.epoch, "kind": e.kind, "text": e.text} for e in found])
        return
    for event in found:
        out.print(f"{moment_words(event.at):<18} {event.text}", markup=False)


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """Read FIELD=VALUE pairs as a nested mapping; values stay text unless they are [lists] or null.

    Raises:
        InputError: One is no such pair.
    """
    nested: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key.strip():
            raise InputError(f"{pair!r} is not FIELD=VALUE.", "Write optim.learning_rate=1e-5.")
        value: Any = text.strip()
        if value == "null":
            value = None
        elif value[:1] in ("[", "{"):
            value = yaml_mapping(f"value: {value}", f"--set {key}")["value"]
        for name in reversed(key.strip().split(".")):
            value = {name: value}
        nested = merge_values(nested, value)
    return nested


def exit_if_failed(row: Any) -> None:
    """End with the exit code of a failure, unless there was none."""
    failure = terminal.failure_of(row)
    if failure is not None:
        err.print(" ".join(failure).strip(), markup=False)
        words = row.error or {}
        by_user = bool(words.get("field")) or words.get("type") in _OF_THE_USER
        raise typer.Exit(USER_ERROR if by_user else OUR_ERROR)


def _follow(studio: Studio, row: RunRow, *, wait: bool, as_json: bool) -> None:
    with workers.need_worker(studio):
        if wait:
            row = terminal.follow_run(studio, row.id)
    if as_json:
        say_json(terminal.run_values(studio, row))
    else:
        out.print(f"run {row.id} is {runs.state_of(row)}: {row.name}", markup=False)
    exit_if_failed(row)


def _say(studio: Studio, row: RunRow, as_json: bool, does: str = "") -> None:
    if as_json:
        say_json(terminal.run_values(studio, row))
    else:
        out.print(f"run {row.id} {does or f'is {runs.state_of(row)}'}", markup=False)


def _show_differences(found: list[Change]) -> None:
    if not found:
        out.print("nothing is different")
    for change in found:
        out.print(f"{change.key}: {change.old} -> {change.new}", markup=False)
