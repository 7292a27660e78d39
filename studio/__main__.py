"""Composition root and command line: `studio COMMAND --home DIR`.

Exit codes: 0 done, 1 our fault, 2 the input or the machine is not right (stderr says what to do).
"""

import logging
import os
import sys
from typing import Annotated

import typer

from studio import terminal
from studio.budget_commands import budget
from studio.dataset_commands import dataset_app
from studio.demo import run_demo
from studio.doctor import examine
from studio.errors import InputError, StudioError
from studio.model_commands import model_app
from studio.options import (
    OUR_ERROR,
    USER_ERROR,
    HomeOption,
    JsonOption,
    RunArgument,
    WaitOption,
    settings_of,
    studio_of,
)
from studio.queue_commands import queue_app
from studio.run_commands import add_to, exit_if_failed
from studio.serve import check_port, serve_page
from studio.services import artifacts, chats, kernels, workers
from studio.services.studio import open_studio
from studio.store_commands import backup, restore
from studio.terminal import err, out, say_json

app = typer.Typer(
    name="studio",
    help="Delta Studio: fine-tune Qwen3-Next and Qwen3.5, and prove that it happened.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_WORKS = {True: "yes", False: "NO", None: "not tried"}
app.add_typer(dataset_app, name="dataset")
app.add_typer(model_app, name="model")
app.add_typer(queue_app, name="queue")
app.command("budget")(budget)
app.command("backup")(backup)
app.command("restore")(restore)


@app.command()
def up(
    home: HomeOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", min=1, max=65535)] = None,
    new: Annotated[bool, typer.Option("--new", help="Begin with an empty database.")] = False,
) -> None:
    """Start the page and one worker process."""
    serve_page(settings_of(home, host=host, port=port, new_database=new or None))


@app.command()
def worker(home: HomeOption = None) -> None:
    """Start a worker by itself, in the foreground; any number may serve one home folder."""
    settings = settings_of(home)
    command = [sys.executable, "-m", "workers", "--home", str(settings.resolved_home())]
    os.execv(sys.executable, command)  # so that a signal to stop reaches the worker itself


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


add_to(app)


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
    exit_if_failed(row)


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
