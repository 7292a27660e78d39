"""What the command line shows: words, tables, progress bars, JSON."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from studio.domain.metrics import LOSS
from studio.domain.run import RunState
from studio.domain.validation import Report
from studio.services import artifacts, runs, waiting
from studio.services.studio import Studio
from studio.store.rows import ArtifactRow, DatasetRow, JobRow, RunRow
from studio.tokens.sandbox import Inspection
from studio.tokens.statistics import Statistics

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
        "kind": row.kind,
        "num_conversations": row.num_conversations,
        "size_bytes": row.size_bytes,
        "parent": row.parent_id,
        "source": row.source,
    }


def report_line(found: Report) -> str:
    """Return what was recognised in a file, on one line."""
    words = (
        f"{found.format}, {found.num_conversations} {found.kind}, "
        f"{found.num_messages} messages, {found.num_warnings} warnings"
    )
    return f"{words}, {found.num_rejected} rejected" if found.num_rejected else words


def show_tokens(found: Inspection) -> None:
    """Print a record as a model reads it: what is learned bright, what is cut struck through."""
    for number, example in enumerate(found.examples, start=1):
        out.print(
            f"example {number} of {len(found.examples)}: {example.tokens} tokens, "
            f"{example.supervised} learned, {example.lost_tokens} cut",
            style="bold",
        )
        text = Text()
        for piece in example.pieces:
            style = "green" if piece.supervised else "dim"
            text.append("".join(piece.texts), style if piece.kept else f"{style} strike")
        out.print(text)


def show_statistics(found: Statistics) -> None:
    """Print a Dataset in a model's own tokens."""
    lengths, cut, epoch = found.lengths, found.cut, found.epoch
    fields = {
        "conversations": found.conversations,
        "examples": found.examples,
        "tokens": found.tokens,
        "trained on": f"{found.supervised} ({found.share_supervised:.1%})",
        "lengths": f"{lengths.shortest} to {lengths.longest}, median {lengths.median}",
        "with thinking": found.thinking.conversations,
        "thinking left out": found.thinking.left_out,
        "tools": ", ".join(f"{name} {count}" for name, count in found.tools.items()) or "none",
        "cutoff": f"{cut.max_length_tokens} tokens, {cut.policy}",
        "longer than that": f"{cut.conversations} conversations",
        "tokens lost": cut.lost_tokens,
        "nothing left": cut.num_nothing_left,
        "packed": f"{found.packing.efficiency:.1%} of {found.packing.bins} rows of "
        f"{found.packing.length_tokens}",
        "an epoch": f"{epoch.tokens} tokens, {epoch.steps} steps",
        "refused": found.num_refused,
    }
    show_fields(fields)
    for refused in found.refused:
        err.print(f"conversation {refused.number + 1}: {refused.message}", markup=False)


def run_values(studio: Studio, row: RunRow) -> dict[str, Any]:
    """Return what a Run is, for --json."""
    return {
        "id": row.id,
        "name": row.name,
        "state": row.state,
        "is_paused": runs.state_of(row) == "PAUSED",
        "stage": row.stage,
        "preset": row.preset,
        "dataset": row.dataset.name,
        "step": row.step,
        "total_steps": row.total_steps,
        "error": row.error,
        "result": row.result,
        "priority": row.priority,
        "start_after": row.start_after,
        "after_run": row.after_run_id,
        "num_gpus": row.num_gpus,
        "needs_gib": row.needs_gib,
        "gpus": row.gpus,
        "host": row.host,
        "worker": row.owner,
        "parent": row.parent_id,
        "parent_step": row.parent_step,
        "parent_keep": row.parent_keep or None,
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
    if row.state == RunState.QUEUED:
        return waiting.why(studio, row.id)
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
