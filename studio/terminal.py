"""What the command line shows: words, tables, progress bars, JSON."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from studio.domain.metrics import LOSS
from studio.domain.run import RunState
from studio.services import artifacts, runs
from studio.services.studio import Studio
from studio.store.rows import ArtifactRow, DatasetRow, JobRow, RunRow

LOOK_SECONDS = 0.3

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def say_json(value: object) -> None:
    """Print a value as JSON to standard output, and nothing else."""
    out.file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def dataset_values(row: DatasetRow) -> dict[str, Any]:
    """Return what a Dataset is, for --json."""
    return {
        "id": row.id,
        "name": row.name,
        "sha256": row.sha256,
        "num_conversations": row.num_conversations,
        "size_bytes": row.size_bytes,
    }


def run_values(studio: Studio, row: RunRow) -> dict[str, Any]:
    """Return what a Run is, for --json."""
    return {
        "id": row.id,
        "name": row.name,
        "state": row.state,
        "stage": row.stage,
        "preset": row.preset,
        "dataset": row.dataset.name,
        "step": row.step,
        "total_steps": row.total_steps,
        "error": row.error,
        "result": row.result,
        "folder": str(studio.home.run(row.id).path),
    }


def merge_values(studio: Studio, row: ArtifactRow) -> dict[str, Any]:
    """Return what a Merge is, for --json."""
    certificate = artifacts.certificate(row)
    return {
        "id": row.id,
        "run": row.run_id,
        "state": row.state,
        "error": row.error,
        "folder": str(artifacts.weights(studio, row)),
        "certificate_passed": None if certificate is None else certificate.passed,
        "certificate": None if certificate is None else certificate.model_dump(mode="json"),
    }


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table)


def show_fields(fields: Mapping[str, object]) -> None:
    """Print names and values, one a line."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        out.print(f"{name:<{width}}  {value}", markup=False)


@contextmanager
def bar(title: str) -> Iterator[tuple[Progress, TaskID]]:
    """Show one progress bar on standard error while the block runs."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err) as progress:
        yield progress, progress.add_task(title, total=1.0, note="")


def follow_run(studio: Studio, run_id: int, title: str = "train") -> RunRow:
    """Show a Run's progress until it is over."""
    with bar(title) as (progress, task):
        while True:
            row = runs.get(studio, run_id)
            done = row.step / row.total_steps if row.total_steps else 0.0
            progress.update(task, completed=done, note=_run_note(studio, row))
            if RunState(row.state).is_final:
                return row
            time.sleep(LOOK_SECONDS)


def _run_note(studio: Studio, row: RunRow) -> str:
    if not row.step:
        return row.stage or row.state.lower()
    points = runs.curves(studio, row.id, [LOSS])[LOSS]
    return f"step {row.step}/{row.total_steps}  loss {points[-1].value:.3f}" if points else ""


def follow_merge(studio: Studio, artifact_id: int, title: str = "merge") -> ArtifactRow:
    """Show a Merge's progress until it is over."""
    with bar(title) as (progress, task):
        while True:
            row = artifacts.get(studio, artifact_id)
            progress.update(task, completed=row.fraction, note=row.stage or row.state.lower())
            if RunState(row.state).is_final:
                return row
            time.sleep(LOOK_SECONDS)


def failure_of(row: JobRow) -> tuple[str, str] | None:
    """Return message and hint of what failed; None when nothing did."""
    if row.state != RunState.FAILED:
        return None
    words = row.error or {}
    return words.get("message", "It failed without a word."), words.get("hint", "")
