"""`studio dataset ...`: check, add, list, show, stats, export, remove."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from studio import terminal
from studio.domain.data_spec import DataSpec
from studio.domain.spec import ModelRef, parse_spec
from studio.domain.validation import Report
from studio.errors import InputError, NotFoundError, disk_errors
from studio.intake.formats import Mapping
from studio.options import USER_ERROR, HomeOption, JsonOption, studio_of
from studio.services import arrivals, datasets, readings
from studio.services.arrivals import Arrival
from studio.services.studio import Studio
from studio.terminal import err, out, say_json

dataset_app = typer.Typer(help="Check, add and look at datasets.", no_args_is_help=True)

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="A file, org/name@revision of the hub, https:// or s3:// address."
    ),
]
ColumnsOption = Annotated[
    str,
    typer.Option(
        "--columns",
        help="What the columns of a table are, as in user=question,assistant=answer.",
    ),
]
DatasetArgument = Annotated[str, typer.Argument(help="Name, number or content hash.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="Base model whose template and tokenizer read it.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A field of a run's data section as FIELD=VALUE, as in thinking=mask, truncation=cut "
        "or max_length_tokens=512; may be repeated.",
        show_default=False,
    ),
]


@dataset_app.command("check")
def check(
    source: SourceArgument,
    columns: ColumnsOption = "",
    rejects: Annotated[
        Path | None, typer.Option(help="Where the rejected records are written.")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a file without storing it."""
    studio = studio_of(home)
    with _arrived(studio, source) as arrival:
        report = datasets.check_file(
            arrival.path,
            name=arrival.name,
            mapping=_mapping(columns),
            max_bytes=studio.settings.max_upload_bytes,
            rejects=rejects,
        )
    if as_json:
        say_json(report.model_dump(mode="json"))
    else:
        out.print(f"{source}: {terminal.report_line(report)}", markup=False)
    _say_issues(report)
    if not report.is_accepted:
        raise typer.Exit(USER_ERROR)


@dataset_app.command("add")
def add(
    source: SourceArgument,
    name: Annotated[str, typer.Option(help="Name; the file's when empty.")] = "",
    columns: ColumnsOption = "",
    drop: Annotated[
        bool, typer.Option("--drop-rejected", help="Store the good records, drop the others.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a file and store it as a dataset."""
    studio = studio_of(home)
    with _arrived(studio, source) as arrival:
        _add(studio, arrival, (name, _mapping(columns), drop), as_json=as_json)


def _add(
    studio: Studio, arrival: Arrival, how: tuple[str, Mapping | None, bool], *, as_json: bool
) -> None:
    name, mapping, drop = how
    with terminal.bar(f"read {arrival.name}") as (progress, task):
        imported = arrivals.take(
            studio,
            arrival,
            name=name,
            mapping=mapping,
            drop_rejected=drop,
            progress=lambda share: progress.update(task, completed=share),
        )
    row, report = imported.row, imported.report
    if row is None:
        _say_issues(report)
        raise InputError(_refusal(arrival.name, report), _what_now(report))
    if as_json:
        say_json({**terminal.dataset_values(row), "is_new": imported.is_new})
        return
    known = "" if imported.is_new else " (the same content was there already)"
    dropped = f", {report.num_rejected} dropped" if report.num_rejected else ""
    out.print(
        f"dataset {row.id}: {row.name}, {row.num_conversations} {row.kind}{dropped}{known}",
        markup=False,
    )


def _refusal(name: str, report: Report) -> str:
    if report.columns:
        return f"{name} is a table with the columns {', '.join(report.columns)}."
    errors = "1 error" if report.num_errors == 1 else f"{report.num_errors} errors"
    return f"{name} has {errors}; nothing was stored."


def _what_now(report: Report) -> str:
    if report.columns:
        return "Say what they are with --columns user=COLUMN,assistant=COLUMN."
    if report.is_salvageable:
        return f"Correct them, or keep the {report.num_conversations} good with --drop-rejected."
    return "Correct the lines named above."


@dataset_app.command("list")
def list_all(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List all datasets."""
    rows = datasets.listing(studio_of(home))
    if as_json:
        say_json([terminal.dataset_values(row) for row in rows])
    else:
        terminal.show_table(
            ("id", "name", "kind", "records", "sha256"),
            [(r.id, r.name, r.kind, r.num_conversations, r.sha256[:12]) for r in rows],
        )


@dataset_app.command("show")
def show(
    dataset: DatasetArgument,
    number: Annotated[int, typer.Option(help="Which conversation, from 1.", min=1)] = 1,
    model: ModelOption = "tiny/qwen3.5",
    fields: SetOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one conversation as the trainer feeds it to a model."""
    studio = studio_of(home)
    seen = readings.inspect(
        studio,
        dataset,
        number - 1,
        ModelRef(id=model),
        _data(fields or []),
    )
    if as_json:
        say_json(seen.model_dump(mode="json"))
    else:
        terminal.show_tokens(seen)


@dataset_app.command("stats")
def stats(
    dataset: DatasetArgument,
    model: ModelOption = "tiny/qwen3.5",
    fields: SetOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count a dataset in a model's own tokens."""
    studio = studio_of(home)
    with terminal.bar("tokenise") as (progress, task):
        found = readings.statistics(
            studio,
            dataset,
            ModelRef(id=model),
            _data(fields or []),
            progress=lambda share: progress.update(task, completed=share),
        )
    if as_json:
        say_json(found.model_dump(mode="json"))
    else:
        terminal.show_statistics(found)


@dataset_app.command("export")
def export(
    dataset: DatasetArgument,
    file: Annotated[Path, typer.Argument(help="Where to write it.")],
    home: HomeOption = None,
) -> None:
    """Write a dataset as OpenAI-messages JSON lines."""
    studio = studio_of(home)
    row = datasets.get(studio, dataset)
    if file.exists():
        raise InputError(f"{file} exists already.", "Choose another name.")
    with disk_errors(f"writing {file}"), tempfile.TemporaryDirectory() as folder:
        shutil.move(datasets.export(studio, row, Path(folder)), file)
    out.print(f"{row.num_conversations} {row.kind} in {file}", markup=False)


@dataset_app.command("remove")
def remove(dataset: DatasetArgument, home: HomeOption = None) -> None:
    """Remove a dataset that no run has used."""
    studio = studio_of(home)
    row = datasets.get(studio, dataset)
    datasets.delete(studio, row.sha256)
    out.print(f"dataset {row.id} is removed: {row.name}", markup=False)


def _data(fields: list[str]) -> DataSpec:
    """Read `--set FIELD=VALUE` as the data section of a spec."""
    pairs = [field.partition("=") for field in fields]
    return parse_spec({"data": {name.strip(): value for name, _, value in pairs}}).data


@contextmanager
def _arrived(studio: Studio, source: str) -> Iterator[Arrival]:
    """Find a source, and remove afterwards what was fetched."""
    path = Path(source).expanduser()
    if path.exists():
        yield arrivals.from_path(path)
        return
    if "://" not in source and path.suffix:
        raise NotFoundError(f"There is no file {source}.", "Give the path of a data file.")
    with terminal.bar(f"fetch {source}") as (progress, task):
        found = arrivals.from_source(
            studio, source, lambda share: progress.update(task, completed=share)
        )
    try:
        yield found
    finally:
        arrivals.discard(studio, found)


def _mapping(columns: str) -> Mapping | None:
    """Read `user=question,assistant=answer`."""
    if not columns:
        return None
    pairs = [item.partition("=") for item in columns.split(",")]
    known = set(Mapping.model_fields)
    for field, _, column in pairs:
        if field.strip() not in known or not column.strip():
            raise InputError(
                f"--columns has {field.strip()!r} for {column.strip()!r}.",
                f"Write FIELD=COLUMN with commas between; fields are {', '.join(sorted(known))}.",
            )
    return arrivals.mapping_of({field.strip(): column.strip() for field, _, column in pairs})


def _say_issues(report: Report) -> None:
    for issue in report.issues:
        err.print(f"{issue.severity}: {issue}", markup=False)
