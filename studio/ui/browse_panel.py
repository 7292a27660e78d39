"""Look at the records of a Dataset one by one; exclude, tag and edit them as a new version."""

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from studio.services import datasets, versions
from studio.services.studio import Studio
from studio.store.rows import DatasetRow
from studio.ui import show, show_record
from studio.ui.edge import shown

# Content hash of a Dataset and number of a record in it, from 1: what the panel shows.
Place = tuple[str, int]
NOWHERE: Place = ("", 1)
RESTORE = "Restore"


@dataclass(frozen=True, kw_only=True, slots=True)
class BrowsePanel:
    """Components of the panel.

    Attributes:
        place: What is shown: changes are made to it, whatever is typed into `number`.
        saved: Content hash of the version that was saved last.
    """

    place: gr.State
    number: gr.Number
    preview: gr.HTML
    state: gr.HTML
    exclude: gr.Button
    tags: gr.Textbox
    text: gr.Code
    changes: gr.HTML
    change_row: gr.Row
    saved: gr.State

    @property
    def outputs(self) -> list[Any]:
        """All that another record changes, in the order of `page`."""
        return [
            self.place,
            self.number,
            self.preview,
            self.state,
            self.exclude,
            self.tags,
            self.text,
            self.changes,
            self.change_row,
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turning:
    """The way from one record to another."""

    back: gr.Button
    number: gr.Number
    forward: gr.Button
    wanted: gr.Textbox


def lay_turning() -> Turning:
    """Lay out the way from one record to another."""
    with gr.Row(elem_classes="beside"):
        back = gr.Button("← Previous", min_width=100, elem_id="dataset-back")
        number = gr.Number(1, label="Record", precision=0, min_width=90, elem_id="dataset-number")
        forward = gr.Button("Next →", min_width=100, elem_id="dataset-forward")
        wanted = gr.Textbox(
            label="Find text (Enter for the next)",
            max_lines=1,
            min_width=180,
            scale=3,
            elem_id="dataset-find",
        )
    return Turning(back=back, number=number, forward=forward, wanted=wanted)


def build(studio: Studio, pick: gr.Dropdown, turning: Turning) -> BrowsePanel:
    """Lay out the panel and wire its events."""
    preview = gr.HTML(elem_id="dataset-preview")
    state = gr.HTML(elem_id="dataset-record-state")
    with gr.Row(elem_classes="beside"):
        exclude = gr.Button("Exclude", min_width=110, elem_id="dataset-exclude")
        tags = gr.Textbox(
            label="Tags",
            placeholder="words, with commas between them",
            max_lines=1,
            min_width=160,
            scale=2,
            elem_id="dataset-tags",
        )
        twins = gr.Button("Exclude all duplicates", min_width=150, elem_id="dataset-twins")
    with gr.Accordion("Edit as JSON", open=False):
        text = gr.Code(
            language="json",
            interactive=True,
            lines=8,
            max_lines=24,
            show_label=False,
            elem_id="dataset-edit",
        )
        keep = gr.Button("Keep this edit", size="sm", elem_id="dataset-edit-keep")
    changes = gr.HTML(elem_id="dataset-changes")
    with gr.Row(visible=False) as change_row:
        save = gr.Button("Save as a new version", variant="primary", elem_id="dataset-version-save")
        discard = gr.Button("Discard the changes", elem_id="dataset-version-discard")
    panel = BrowsePanel(
        place=gr.State(NOWHERE),
        number=turning.number,
        preview=preview,
        state=state,
        exclude=exclude,
        tags=tags,
        text=text,
        changes=changes,
        change_row=change_row,
        saved=gr.State(""),
    )
    _wire_turning(studio, panel, pick, turning)
    _wire_changes(studio, panel, (keep, twins))
    _wire_versions(studio, panel, (save, discard))
    return panel


def _wire_turning(studio: Studio, panel: BrowsePanel, pick: gr.Dropdown, turning: Turning) -> None:
    def turn(place: Place, by: int) -> list[Any]:
        sha256, at = place
        return page(studio, sha256, at + by)

    def find(place: Place, text: str | None) -> list[Any]:
        sha256, at = place
        if not sha256 or not (text or "").strip():
            return [gr.skip() for _ in panel.outputs]
        row = datasets.get(studio, sha256)
        found = datasets.find(studio.home, row, text or "", at)
        if found is None:
            found = datasets.find(studio.home, row, text or "", 0)
        if found is None:
            gr.Info(f"No record of {escape(row.name)} holds this text.", title="Not found")
            return [gr.skip() for _ in panel.outputs]
        return page(studio, sha256, found + 1)

    def go(sha256: str | None, at: float | None) -> list[Any]:
        wanted = 1 if at is None else int(at)
        if sha256:
            last = datasets.get(studio, sha256).num_conversations
            if not 1 <= wanted <= last:
                gr.Info(
                    f"There is no record {wanted:,}: they go from 1 to {last:,}.", title="Not found"
                )
        return page(studio, sha256, wanted)

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    turning.back.click(shown(lambda place: turn(place, -1)), panel.place, panel.outputs, **quiet)
    turning.forward.click(shown(lambda place: turn(place, 1)), panel.place, panel.outputs, **quiet)
    panel.number.submit(shown(go), [pick, panel.number], panel.outputs, **quiet)
    turning.wanted.submit(shown(find), [panel.place, turning.wanted], panel.outputs, **quiet)


def _wire_changes(studio: Studio, panel: BrowsePanel, widgets: tuple[gr.Button, gr.Button]) -> None:
    keep, twins = widgets

    # The button's own word decides, so that two browsers cannot undo each other by one click each.
    def exclude(place: Place, word: str) -> list[Any]:
        sha256, at = place
        change = versions.restore if word == RESTORE else versions.exclude
        change(studio, sha256, [at - 1])
        return page(studio, *place)

    def tag(place: Place, text: str | None) -> list[Any]:
        sha256, at = place
        words = [word.strip() for word in (text or "").split(",")]
        versions.tag(studio, sha256, at - 1, [word for word in words if word])
        return page(studio, *place)

    def edit(place: Place, text: str | None) -> list[Any]:
        sha256, at = place
        versions.edit(studio, sha256, at - 1, text or "")
        return page(studio, *place)

    def drop(place: Place) -> list[Any]:
        dropped = versions.drop_duplicates(studio, place[0], near=True)
        words = f"{dropped:,} duplicates and near-duplicates are excluded."
        gr.Info(words if dropped else "There are no duplicates.", title="Duplicates")
        return page(studio, *place)

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    panel.exclude.click(shown(exclude), [panel.place, panel.exclude], panel.outputs, **quiet)
    panel.tags.submit(shown(tag), [panel.place, panel.tags], panel.outputs, **quiet)
    panel.tags.blur(shown(tag), [panel.place, panel.tags], panel.outputs, **quiet)
    keep.click(shown(edit), [panel.place, panel.text], panel.outputs)
    twins.click(shown(drop), panel.place, panel.outputs)


def _wire_versions(
    studio: Studio, panel: BrowsePanel, widgets: tuple[gr.Button, gr.Button]
) -> None:
    save, discard = widgets

    def store(place: Place) -> str:
        row = versions.save(studio, place[0])
        name = escape(row.name)
        gr.Info(f"Saved as {name}; the one that it came from is unchanged.", title="New version")
        return row.sha256

    def forget(place: Place) -> list[Any]:
        versions.discard(studio, place[0])
        return page(studio, *place)

    save.click(shown(store), panel.place, panel.saved)
    discard.click(shown(forget), panel.place, panel.outputs)


def page(studio: Studio, sha256: str | None, wanted: int) -> list[Any]:
    """Return what the panel shows for a record, counted from 1; the nearest one that there is."""
    if not sha256:
        return [NOWHERE, 1, "", "", gr.skip(), "", "", "", gr.Row(visible=False)]
    row = datasets.get(studio, sha256)
    at = min(max(wanted, 1), row.num_conversations)
    current = versions.current(studio, sha256, at - 1)
    summary = _changes(studio, row)
    return [
        (sha256, at),
        at,
        show_record.record(current.record),
        _state(row, at, current),
        RESTORE if current.is_excluded else "Exclude",
        ", ".join(current.tags),
        current.text,
        summary,
        gr.Row(visible=bool(summary)),
    ]


def _state(row: DatasetRow, at: int, current: versions.Current) -> str:
    words = [f"{at:,} of {row.num_conversations:,}"]
    if current.is_excluded:
        words.append("excluded from the next version")
    if current.is_edited:
        words.append("edited for the next version")
    return f'<div class="under"><span>{" · ".join(words)}</span></div>'


def _changes(studio: Studio, row: DatasetRow) -> str:
    found = versions.changes(studio, row.sha256)
    numbers = (
        (len(found.excluded), "excluded"),
        (len(found.edited), "edited"),
        (len(found.tagged), "tagged"),
    )
    words = ", ".join(f"{number:,} {word}" for number, word in numbers if number)
    if not words:
        return ""
    return show.notice(
        "info",
        f"Changes that no version has yet: {words}.",
        f"{row.name} itself stays as it is; a run trains on what was saved.",
    )
