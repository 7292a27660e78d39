"""Datasets: add, see what was recognised, look at it as a person and as a model, change it."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.domain.conversation import Kind
from studio.domain.validation import Report
from studio.services import datasets
from studio.services.studio import Studio
from studio.ui import (
    add_panel,
    browse_panel,
    inspect_panel,
    reading_choices,
    show,
    show_report,
    stats_panel,
)
from studio.ui.edge import shown
from studio.ui.show_report import NOUNS

EMPTY = show.empty(
    "No dataset yet",
    "Upload conversations, name where they lie, or start with the example data set.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetsTab:
    """Components that other tabs and the page's start refer to.

    Attributes:
        added: Content hash of the Dataset that was added or saved last.
    """

    pick: gr.Dropdown
    added: gr.State


def choices(studio: Studio) -> list[tuple[str, str]]:
    """Return all Datasets as (label, content hash), newest first."""
    return [
        (f"{row.name} · {show.counted(row.num_conversations, NOUNS[Kind(row.kind)])}", row.sha256)
        for row in datasets.listing(studio)
    ]


def build(studio: Studio) -> DatasetsTab:
    """Lay out the tab and wire its events."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            adding = add_panel.build(studio)
        with gr.Column(scale=4, min_width=300):
            pick = gr.Dropdown(
                label="Dataset", choices=[], interactive=True, elem_id="dataset-pick"
            )
            empty = gr.HTML(EMPTY, elem_id="dataset-empty")
            with gr.Column(visible=False) as looking, gr.Tabs(overflow_behavior="wrap"):
                with gr.Tab("What was found"):
                    report = gr.HTML(elem_id="dataset-report")
                with gr.Tab("Record by record"):
                    turning = browse_panel.lay_turning()
                    with gr.Tabs(overflow_behavior="wrap"):
                        with gr.Tab("As a conversation"):
                            browsing = browse_panel.build(studio, pick, turning)
                        with gr.Tab("As the model reads it"):
                            reading = reading_choices.build(studio, "inspect")
                            inspect_panel.build(studio, browsing.place, reading)
                with gr.Tab("In tokens"):
                    counting = reading_choices.build(studio, "stats")
                    stats_panel.build(studio, pick, counting)

    def look(sha256: str | None) -> list[Any]:
        row = datasets.get(studio, sha256) if sha256 else None
        return [
            gr.HTML(visible=row is None),
            gr.Column(visible=row is not None),
            show_report.report(row, Report.model_validate(row.report)) if row else "",
            *browse_panel.page(studio, sha256, 1),
        ]

    # The list changes too, and Gradio does not tell every time that its choice did.
    def choose(sha256: str) -> list[Any]:
        return [gr.Dropdown(choices=choices(studio), value=sha256), sha256, *look(sha256)]

    views = [empty, looking, report, *browsing.outputs]
    pick.change(shown(look), pick, views, show_progress="hidden")
    added = gr.State("")
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    adding.added.change(shown(choose), adding.added, [pick, added, *views], **quiet)
    browsing.saved.change(shown(choose), browsing.saved, [pick, added, *views], **quiet)
    return DatasetsTab(pick=pick, added=added)
