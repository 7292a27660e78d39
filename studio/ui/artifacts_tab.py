"""Artifacts: merge a Run's Adapter into its base, and see the Certificate."""

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from studio.domain.run import RunState
from studio.errors import NotFoundError
from studio.services import artifacts, runs
from studio.services.studio import Studio
from studio.store.rows import ArtifactRow
from studio.ui import show
from studio.ui.edge import shown

LOOK_SECONDS = 1.5
EMPTY = show.empty(
    "No merge yet",
    "A finished or stopped run leaves an adapter. Merge it into its base to use it anywhere.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactsTab:
    """Components that other tabs and the page's start refer to."""

    pick: gr.Dropdown
    merge: gr.Button


def choices(studio: Studio) -> list[tuple[str, int]]:
    """Return the Runs that have an Adapter as (label, number), newest first."""
    return [
        (f"run {row.id} · {row.name} · {row.state.lower()} at step {row.step}", row.id)
        for row in runs.listing(studio)
        if artifacts.has_result(studio, row)
    ]


def build(studio: Studio) -> ArtifactsTab:
    """Lay out the tab and wire its events."""
    timer = gr.Timer(LOOK_SECONDS)
    seen = gr.State("")
    with gr.Row(equal_height=True):
        pick = gr.Dropdown(
            choices=[],
            label="Adapter",
            info="What a run has learned.",
            scale=4,
            interactive=True,
            elem_id="artifact-pick",
        )
        merge = gr.Button(
            "Merge into the base",
            variant="primary",
            scale=1,
            min_width=160,
            elem_id="artifact-merge",
        )
    merges = gr.HTML(elem_id="artifact-list")

    def look(before: str) -> Any:
        text = _cards(studio)
        return (gr.skip(), gr.skip()) if text == before else (text, text)

    def order(run_id: int | None) -> None:
        if run_id is None:
            raise NotFoundError(
                "No adapter is chosen.", "Train a run first; when it is over it stands in the list."
            )
        merge = artifacts.merge(studio, int(run_id))
        if merge.state == RunState.FINISHED:
            gr.Info(f"Merge {merge.id} is this run's; the same merge is not made twice.")

    timer.tick(shown(look), seen, [seen, merges], show_progress="hidden")
    merge.click(shown(order), pick, None).then(
        shown(look), seen, [seen, merges], show_progress="hidden"
    )
    return ArtifactsTab(pick=pick, merge=merge)


def _cards(studio: Studio) -> str:
    rows = artifacts.listing(studio)
    return "".join(_card(studio, row) for row in rows) if rows else EMPTY


def _card(studio: Studio, row: ArtifactRow) -> str:
    title = f"Merge {row.id} · run {row.run_id} · {row.run.name}"
    head = f'<div class="head"><h3>{escape(title)}</h3>{show.chip(row.state)}</div>'
    if row.state == RunState.FAILED:
        words = row.error or {}
        body = show.notice("bad", words.get("message", "It failed."), words.get("hint", ""))
    elif row.state == RunState.FINISHED:
        found = artifacts.certificate(row)
        folder = artifacts.weights(studio, row)
        place = f"{show.size(row.size_bytes or 0)} in {folder}"
        body = (show.certificate(found) if found else "") + show.notice(
            "info", place, "An ordinary Hugging Face folder: from_pretrained loads it as it is."
        )
    else:
        percent = f"{row.fraction * 100:.0f}"
        doing = row.stage or "waiting for a worker"
        body = (
            f'<div class="meter" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{percent}" aria-label="progress"><i style="width:{percent}%"></i>'
            f'</div><div class="under"><span>{escape(doing)}</span><span>{percent} %</span></div>'
        )
    return f'<div class="card" data-merge="{row.id}" data-state="{row.state}">{head}{body}</div>'
