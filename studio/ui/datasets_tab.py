"""Datasets: upload, see what was recognised, look at the conversations."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from studio.domain.conversation import Conversation
from studio.domain.validation import Report
from studio.services import datasets
from studio.services.studio import Studio
from studio.store.rows import DatasetRow
from studio.ui import show
from studio.ui.edge import shown

EMPTY = show.empty(
    "No dataset yet",
    "Upload a JSON lines file of OpenAI messages, or start with the example data set.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetsTab:
    """Components that other tabs and the page's start refer to."""

    pick: gr.Dropdown
    added: gr.State


def choices(studio: Studio) -> list[tuple[str, str]]:
    """Return all Datasets as (label, content hash), newest first."""
    return [
        (f"{row.name} · {row.num_conversations} conversations", row.sha256)
        for row in datasets.listing(studio)
    ]


def build(studio: Studio) -> DatasetsTab:
    """Lay out the tab and wire its events."""
    added = gr.State("")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = gr.File(
                label="Upload JSON lines",
                height=150,
                elem_id="dataset-upload",
            )
            example = gr.Button("Use the example data set", elem_id="dataset-example")
            answer = gr.HTML(elem_id="dataset-answer")
        with gr.Column(scale=3, min_width=300):
            pick = gr.Dropdown(
                label="Dataset", choices=[], interactive=True, elem_id="dataset-pick"
            )
            report = gr.HTML(EMPTY, elem_id="dataset-report")
            with gr.Column(visible=False) as browser:
                preview, back, number, forward = _reader()

    def take_file(path: str | None, progress: Any = gr.Progress()) -> Any:
        if path is None:
            return gr.skip(), gr.skip(), gr.skip()
        name = Path(path).name
        progress(0, desc=f"Reading {name}")
        row, found = datasets.import_file(
            studio, Path(path), progress=lambda share: progress(share, desc=f"Reading {name}")
        )
        if row is None:
            return show.rejected(name, found), gr.skip(), gr.skip()
        return _taken(studio, row, found)

    def take_example() -> Any:
        row = datasets.import_example(studio)
        return _taken(studio, row, Report.model_validate(row.report))

    def look(sha256: str | None) -> Any:
        if not sha256:
            return EMPTY, gr.Column(visible=False), 1, []
        row = datasets.get(studio, sha256)
        found = Report.model_validate(row.report)
        return show.report(row, found), gr.Column(visible=True), 1, _page(studio, sha256, 1)[1]

    def turn(sha256: str | None, at: float | None, by: int) -> Any:
        return _page(studio, sha256, int(at or 1) + by)

    answers = [answer, pick, added]
    upload.upload(shown(take_file), upload, answers, show_progress_on=answer)
    upload.clear(lambda: "", None, answer)
    example.click(shown(take_example), None, answers)
    pick.change(shown(look), pick, [report, browser, number, preview])
    back.click(shown(lambda sha, at: turn(sha, at, -1)), [pick, number], [number, preview])
    forward.click(shown(lambda sha, at: turn(sha, at, 1)), [pick, number], [number, preview])
    number.submit(shown(lambda sha, at: turn(sha, at, 0)), [pick, number], [number, preview])
    return DatasetsTab(pick=pick, added=added)


def _reader() -> tuple[gr.Chatbot, gr.Button, gr.Number, gr.Button]:
    """Lay out one Conversation, and the way to the ones before and after it."""
    preview = gr.Chatbot(
        label="Conversation",
        height=420,
        render_markdown=False,
        allow_tags=False,
        buttons=["copy"],
        feedback_options=None,
        elem_id="dataset-preview",
    )
    with gr.Row(equal_height=True):
        back = gr.Button("← Previous", min_width=90, elem_id="dataset-back")
        number = gr.Number(
            1,
            label="Conversation",
            precision=0,
            minimum=1,
            min_width=90,
            elem_id="dataset-number",
        )
        forward = gr.Button("Next →", min_width=90, elem_id="dataset-forward")
    return preview, back, number, forward


def _taken(studio: Studio, row: DatasetRow, found: Report) -> tuple[str, gr.Dropdown, str]:
    pick = gr.Dropdown(choices=choices(studio), value=row.sha256)
    return _welcome(row.name, found), pick, row.sha256


def _welcome(name: str, found: Report) -> str:
    notes = f"; {found.num_warnings} warnings" if found.num_warnings else ""
    return show.notice(
        "good",
        f"{name} is ready: {found.num_conversations} conversations{notes}.",
        "Look at it on the right, or go on to Train.",
    )


def _page(studio: Studio, sha256: str | None, wanted: int) -> tuple[int, list[dict[str, Any]]]:
    if not sha256:
        return 1, []
    row = datasets.get(studio, sha256)
    at = min(max(wanted, 1), row.num_conversations)
    found = datasets.conversations(studio.home, row, at - 1, 1)
    return at, bubbles(found[0]) if found else []


def bubbles(conversation: Conversation) -> list[dict[str, Any]]:
    """Return a Conversation as chat bubbles; what is no plain turn gets a titled one."""
    shown_messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        if message.role in ("system", "developer"):
            shown_messages.append(_titled("System message", message.content))
        elif message.role == "tool":
            shown_messages.append(_titled("Result of the tool", message.content))
        else:
            if message.reasoning_content:
                shown_messages.append(_titled("Reasoning", message.reasoning_content))
            if message.content:
                shown_messages.append({"role": message.role, "content": message.content})
            for call in message.tool_calls:
                arguments = json.dumps(call.arguments, ensure_ascii=False)
                shown_messages.append(_titled(f"Calls {call.name}", arguments))
    return shown_messages


def _titled(title: str, content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "metadata": {"title": title}}
