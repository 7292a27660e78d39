"""Look at the records of a Dataset one by one; exclude, tag and edit them as a new version."""

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.domain.conversation import Conversation, Message, PlainText, Preference, Record
from studio.services import datasets, versions
from studio.services.studio import Studio
from studio.store.rows import DatasetRow
from studio.ui import show
from studio.ui.edge import shown

MAX_BUBBLE_CHARACTERS = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class BrowsePanel:
    """Components of the panel.

    Attributes:
        saved: Content hash of the version that was saved last.
    """

    number: gr.Number
    preview: gr.Chatbot
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
        number = gr.Number(
            1, label="Record", precision=0, minimum=1, min_width=90, elem_id="dataset-number"
        )
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
    preview = gr.Chatbot(
        label="Conversation",
        height=420,
        render_markdown=False,
        allow_tags=False,
        buttons=["copy"],
        feedback_options=None,
        elem_id="dataset-preview",
    )
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
    _wire_changes(studio, panel, pick, (keep, twins))
    _wire_versions(studio, panel, pick, (save, discard))
    return panel


def _wire_turning(studio: Studio, panel: BrowsePanel, pick: gr.Dropdown, turning: Turning) -> None:
    def turn(sha256: str | None, at: float | None, by: int) -> list[Any]:
        return page(studio, sha256, int(at or 1) + by)

    def find(sha256: str | None, at: float | None, text: str | None) -> list[Any]:
        if not sha256 or not (text or "").strip():
            return [gr.skip() for _ in panel.outputs]
        row = datasets.get(studio, sha256)
        start = int(at or 1)
        found = datasets.find(studio.home, row, text or "", start)
        if found is None:
            found = datasets.find(studio.home, row, text or "", 0)
        if found is None:
            gr.Info(f"No record of {row.name} holds this text.", title="Not found")
            return [gr.skip() for _ in panel.outputs]
        return page(studio, sha256, found + 1)

    def go(sha256: str | None, at: float | None) -> list[Any]:
        if (
            sha256
            and at is not None
            and not 1 <= at <= datasets.get(studio, sha256).num_conversations
        ):
            last = datasets.get(studio, sha256).num_conversations
            gr.Info(f"There is no record {at:.0f}: they go from 1 to {last:,}.", title="Not found")
        return turn(sha256, at, 0)

    where = [pick, panel.number]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    turning.back.click(shown(lambda sha, at: turn(sha, at, -1)), where, panel.outputs, **quiet)
    turning.forward.click(shown(lambda sha, at: turn(sha, at, 1)), where, panel.outputs, **quiet)
    panel.number.submit(shown(go), where, panel.outputs, **quiet)
    turning.wanted.submit(shown(find), [*where, turning.wanted], panel.outputs, **quiet)


def _wire_changes(
    studio: Studio, panel: BrowsePanel, pick: gr.Dropdown, widgets: tuple[gr.Button, gr.Button]
) -> None:
    keep, twins = widgets

    def exclude(sha256: str, at: float) -> list[Any]:
        index = int(at) - 1
        if versions.current(studio, sha256, index).is_excluded:
            versions.restore(studio, sha256, [index])
        else:
            versions.exclude(studio, sha256, [index])
        return page(studio, sha256, int(at))

    def tag(sha256: str, at: float, text: str | None) -> list[Any]:
        words = [word.strip() for word in (text or "").split(",")]
        versions.tag(studio, sha256, int(at) - 1, [word for word in words if word])
        return page(studio, sha256, int(at))

    def edit(sha256: str, at: float, text: str | None) -> list[Any]:
        versions.edit(studio, sha256, int(at) - 1, text or "")
        return page(studio, sha256, int(at))

    def drop(sha256: str, at: float) -> list[Any]:
        dropped = versions.drop_duplicates(studio, sha256, near=True)
        gr.Info(f"{dropped:,} duplicates and near-duplicates are excluded.", title="Duplicates")
        return page(studio, sha256, int(at))

    where = [pick, panel.number]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    panel.exclude.click(shown(exclude), where, panel.outputs, **quiet)
    panel.tags.submit(shown(tag), [*where, panel.tags], panel.outputs, **quiet)
    panel.tags.blur(shown(tag), [*where, panel.tags], panel.outputs, **quiet)
    keep.click(shown(edit), [*where, panel.text], panel.outputs)
    twins.click(shown(drop), where, panel.outputs)


def _wire_versions(
    studio: Studio, panel: BrowsePanel, pick: gr.Dropdown, widgets: tuple[gr.Button, gr.Button]
) -> None:
    save, discard = widgets

    def store(sha256: str) -> str:
        row = versions.save(studio, sha256)
        gr.Info(
            f"Saved as {row.name}; the one that it came from is unchanged.", title="New version"
        )
        return row.sha256

    def forget(sha256: str, at: float) -> list[Any]:
        versions.discard(studio, sha256)
        return page(studio, sha256, int(at))

    save.click(shown(store), pick, panel.saved)
    discard.click(shown(forget), [pick, panel.number], panel.outputs)


def page(studio: Studio, sha256: str | None, wanted: int) -> list[Any]:
    """Return what the panel shows for a record, counted from 1; the nearest one that there is."""
    if not sha256:
        return [1, [], "", gr.skip(), "", "", "", gr.Row(visible=False)]
    row = datasets.get(studio, sha256)
    at = min(max(wanted, 1), row.num_conversations)
    current = versions.current(studio, sha256, at - 1)
    summary = _changes(studio, row)
    return [
        at,
        bubbles(current.record),
        _state(row, at, current),
        "Restore" if current.is_excluded else "Exclude",
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


def bubbles(record: Record) -> list[dict[str, Any]]:
    """Return a record as chat bubbles; what is no plain turn gets a titled one."""
    if isinstance(record, PlainText):
        return [_titled("Text", record.text)]
    if isinstance(record, Conversation):
        return _turns(record.messages)
    assert isinstance(record, Preference)
    return [
        *_turns(record.messages),
        *_ending("Better answer", record.chosen),
        *_ending("Worse answer", record.rejected),
    ]


def _turns(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for message in messages:
        content = message.content + "".join(
            f"\n[image: {image.ref[:80]}]" for image in message.images
        )
        if message.role in ("system", "developer"):
            found.append(_titled("System message", content))
        elif message.role == "tool":
            found.append(_titled("Result of the tool", content))
        else:
            if message.reasoning_content:
                found.append(_titled("Thinking", message.reasoning_content))
            if message.weight == 0:
                found.append(_titled("Answer that is not learned (weight 0)", content))
            elif content:
                found.append({"role": message.role, "content": content[:MAX_BUBBLE_CHARACTERS]})
            for call in message.tool_calls:
                arguments = json.dumps(call.arguments, ensure_ascii=False)
                found.append(_titled(f"Calls {call.name}", arguments))
    return found


def _ending(title: str, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    return [_titled(title, message.content) for message in messages]


def _titled(title: str, content: str) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content[:MAX_BUBBLE_CHARACTERS],
        "metadata": {"title": title},
    }
