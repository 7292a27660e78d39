"""Composition root and command line: `studio COMMAND --home DIR`.

Exit codes: 0 done, 1 our fault, 2 the input or the machine is not right (stderr says what to do).
"""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from studio import terminal
from studio.budget_commands import budget
from studio.dataset_commands import dataset_app
from studio.demo import run_demo
from studio.doctor import examine
from studio.errors import ConflictError, InputError, MachineError, NotFoundError, StudioError
from studio.model_commands import model_app
from studio.options import OUR_ERROR, USER_ERROR, HomeOption, JsonOption, settings_of, studio_of
from studio.serve import check_port, serve_page
from studio.services import artifacts, chats, kernels, runs, workers
from studio.services.studio import Studio, open_studio
from studio.store.rows import RunRow
from studio.terminal import err, out, say_json

app = typer.Typer(
    name="studio",
    help="Delta Studio: fine-tune Qwen3-Next and Qwen3.5, and prove that it happened.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_WORKS = {True: "yes", False: "NO", None: "not tried"}
# Failures of a process that the user can mend; an EngineError is one where it names a field.
_OF_THE_USER = tuple(
    kind.__name__ for kind in (InputError, NotFoundError, ConflictError, MachineError)
)
app.add_typer(dataset_app, name="dataset")
app.add_typer(model_app, name="model")
app.command("budget")(budget)

WaitOption = Annotated[bool, typer.Option("--wait", help="Wait until it is over.")]
RunArgument = Annotated[int, typer.Argument(help="Number of the run.", min=1)]


@app.command()
def up(
    home: HomeOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", min=1, max=65535)] = None,
) -> None:
    """Start the page and one worker process."""
    serve_page(settings_of(home, host=host, port=port))


@app.command()
def worker(home: HomeOption = None) -> None:
    """Start a worker by itself, in the foreground."""
    studio = studio_of(home)
    if workers.is_alive(studio.home):
        raise MachineError(
            f"A worker serves {studio.home.path} already.",
            "One worker per home folder is enough; stop it first to take its place.",
        )
    command = [sys.executable, "-m", "workers", "--home", str(studio.home.path)]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@app.command()
def demo(
    home: HomeOption = None,
    stop_after: Annotated[bool, typer.Option("--exit", help="Do not open the page after.")] = False,
    port: Annotated[int | None, typer.Option(help="Port of the page.", min=1, max=65535)] = None,
) -> None:
    """Run the main job on the example data, then leave the studio open."""
    settings = settings_of(home, port=port)
    if not stop_after:
        check_port(settings.host, settings.port)
    passed = run_demo(open_studio(settings))
    if not stop_after:
        serve_page(settings)
    if not passed:
        raise typer.Exit(OUR_ERROR)


@app.command()
def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Say what this machine has, and what is missing."""
    findings = examine(studio_of(home))
    if as_json:
        say_json([finding.model_dump() for finding in findings])
    else:
        for finding in findings:
            mark = {True: "ok  ", False: "BAD ", None: "    "}[finding.good]
            out.print(f"{mark} {finding.name:<16} {finding.text}", markup=False)
    if any(finding.good is False for finding in findings):
        raise typer.Exit(USER_ERROR)


@app.command("kernels")
def try_kernels(as_json: JsonOption = False) -> None:
    """Try every fast kernel on this machine's best device."""
    found = kernels.measure()
    if as_json:
        say_json(found.model_dump(mode="json"))
        return
    out.print(f"{found.device}, {', '.join(f'{k} {v}' for k, v in found.versions.items())}")
    rows = [
        (k.title, f"{k.package} {k.version or '-'}", _WORKS[k.works], k.note) for k in found.kernels
    ]
    terminal.show_table(("kernel", "package", "works", "note"), rows)


@app.command()
def presets(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List all presets."""
    found = studio_of(home).presets
    if as_json:
        say_json([preset.model_dump(mode="json") for preset in found.values()])
        return
    terminal.show_table(
        ("preset", "GPUs", "GiB each", "title"),
        [(p.name, p.needs.gpus, p.needs.gpu_memory_gib or "-", p.title) for p in found.values()],
    )


@app.command()
def run(
    spec_file: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="JobSpec as YAML.")],
    wait: WaitOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Launch a training run from a spec; `preset: NAME` alone fills in the rest."""
    studio = studio_of(home)
    row = runs.submit(studio, runs.spec_from_file(studio, spec_file))
    _follow(studio, row, wait=wait, as_json=as_json)


def _follow(studio: Studio, row: RunRow, *, wait: bool, as_json: bool) -> None:
    with workers.need_worker(studio):
        if wait:
            row = terminal.follow_run(studio, row.id)
    if as_json:
        say_json(terminal.run_values(studio, row))
    else:
        out.print(f"run {row.id} is {row.state}: {row.name}", markup=False)
    _exit_if_failed(row)


def _exit_if_failed(row: Any) -> None:
    failure = terminal.failure_of(row)
    if failure is not None:
        err.print(" ".join(failure).strip(), markup=False)
        words = row.error or {}
        by_user = bool(words.get("field")) or words.get("type") in _OF_THE_USER
        raise typer.Exit(USER_ERROR if by_user else OUR_ERROR)


@app.command("runs")
def list_runs(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the newest runs."""
    studio = studio_of(home)
    rows = runs.listing(studio)
    if as_json:
        say_json([terminal.run_values(studio, row) for row in rows])
    else:
        terminal.show_table(
            ("run", "state", "step", "name"),
            [(r.id, r.state, f"{r.step}/{r.total_steps or '-'}", r.name) for r in rows],
        )


@app.command()
def show(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show one run with its proofs."""
    studio = studio_of(home)
    row = runs.get(studio, run_id)
    values = terminal.run_values(studio, row)
    proofs = runs.proofs(studio, run_id).proofs
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


@app.command()
def stop(run_id: RunArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Stop a run; it saves its adapter at the next step boundary."""
    studio = studio_of(home)
    row = runs.stop(studio, run_id)
    if as_json:
        say_json(terminal.run_values(studio, row))
    else:
        out.print(f"run {row.id} is {row.state}")


@app.command()
def resume(
    run_id: RunArgument,
    wait: WaitOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a stopped or failed run from its latest checkpoint."""
    studio = studio_of(home)
    _follow(studio, runs.resume(studio, run_id), wait=wait, as_json=as_json)


@app.command()
def merge(
    run_id: RunArgument,
    wait: WaitOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge a run's adapter into its base, and certify the result."""
    studio = studio_of(home)
    row = artifacts.merge(studio, run_id)
    with workers.need_worker(studio):
        if wait:
            row = terminal.follow_merge(studio, row.id)
    if as_json:
        say_json(terminal.merge_values(studio, row))
    else:
        out.print(f"merge {row.id} of run {run_id} is {row.state}")
        certificate = artifacts.certificate(row)
        if certificate is not None:
            out.print(f"certificate {'passed' if certificate.passed else 'FAILED'}")
            out.print(f"weights in {artifacts.weights(studio, row)}", markup=False)
    _exit_if_failed(row)


@app.command()
def chat(
    run_id: RunArgument,
    message: Annotated[str, typer.Option("-m", "--message", help="What to ask.")],
    base: Annotated[bool, typer.Option("--base", help="Ask the base, not the tuned.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the tuned model of a run, or its base, one question."""
    if not message.strip():
        raise InputError("The message is empty.", "Write a question after -m.")
    studio = studio_of(home)
    row = chats.open_chat(studio, run_id)
    side: chats.Side = "base" if base else "tuned"
    messages = [{"role": "user", "content": message}]
    with workers.need_worker(studio):
        with terminal.bar("open the chat") as (progress, task):
            ready = chats.wait_ready(studio, row.id, lambda t: progress.update(task, note=t))
            progress.update(task, completed=1.0)
        pieces = []
        for delta in chats.ask(
            studio, ready, side, messages, chats.Sampling(max_tokens=max_tokens)
        ):
            pieces.append(delta.content)
            if not as_json:
                out.print(delta.content, end="", markup=False)
    if as_json:
        say_json({"run": run_id, "model": side, "message": message, "answer": "".join(pieces)})
    else:
        out.print()


def main() -> None:
    """Run the command line; expected errors become one sentence on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        app()
    except StudioError as error:
        err.print(str(error), markup=False)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
