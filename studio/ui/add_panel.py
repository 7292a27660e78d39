"""Add Datasets: upload, path, hub or address, example; and what to do with a file that has faults."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from studio.domain.validation import Report
from studio.errors import StudioError
from studio.intake.formats import Mapping, guess_mapping
from studio.services import arrivals, datasets
from studio.services.arrivals import Arrival
from studio.services.datasets import Imported
from studio.services.studio import Studio
from studio.ui import show, show_report
from studio.ui.edge import shown
from studio.ui.upload import upload_box

COLUMN_TITLES = {
    "user": "Question (user)",
    "assistant": "Answer (assistant)",
    "system": "System message",
    "reasoning": "Thinking",
    "text": "Plain text",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A file that was read and not stored: its faults wait for a decision.

    Attributes:
        columns: Of a table; its choice of columns may be changed until it is stored.
    """

    arrival: Arrival
    mapping: Mapping | None
    report: Report
    rejects: str | None
    columns: tuple[str, ...]


Queue = tuple[Waiting, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AddPanel:
    """Components of the panel.

    Attributes:
        waiting: Queue of the files with faults; the first is decided on.
        added: Content hash of the Dataset that was added last.
    """

    answer: gr.HTML
    waiting: gr.State
    added: gr.State
    choice: gr.Column
    keep: gr.Button
    rejects: gr.DownloadButton
    columns: gr.Column
    fields: tuple[gr.Dropdown, ...]

    @property
    def outputs(self) -> list[Any]:
        """All that an answer changes, in the order of `_answer`."""
        return [
            self.answer,
            self.waiting,
            self.added,
            self.choice,
            self.keep,
            self.rejects,
            self.columns,
            *self.fields,
        ]


def build(studio: Studio) -> AddPanel:
    """Lay out the panel and wire its events."""
    _, ids = upload_box("Upload conversations")
    with gr.Accordion("From this machine, the Hub or an address", open=False):
        source = gr.Textbox(
            label="Where it lies",
            placeholder="/data/chats.jsonl · org/name@revision · https://… · s3://…",
            info="A path on the server, a Hugging Face dataset, or an address.",
            max_lines=1,
            elem_id="dataset-source",
        )
        take = gr.Button("Add from there", size="sm", elem_id="dataset-source-add")
    example = gr.Button("Use the example data set", elem_id="dataset-example")
    panel, use, discard = _decisions()
    _wire_arrivals(studio, panel, ids, source, take)
    _wire_decisions(studio, panel, use, discard)

    def take_example() -> list[Any]:
        row = datasets.import_example(studio)
        return [show_report.welcome(row, is_new=True), (), row.sha256, *_no_choice()]

    example.click(shown(take_example), None, panel.outputs)
    return panel


def _decisions() -> tuple[AddPanel, gr.Button, gr.Button]:
    """Lay out the answer, and what may be decided on a file with faults."""
    answer = gr.HTML(elem_id="dataset-answer")
    with gr.Column(visible=False, elem_id="dataset-columns") as columns:
        gr.Markdown("**Which column is what?** Leave empty what the file does not have.")
        with gr.Row():
            fields = tuple(
                gr.Dropdown(
                    label=title,
                    choices=[],
                    interactive=True,
                    min_width=140,
                    elem_id=f"dataset-column-{name}",
                )
                for name, title in COLUMN_TITLES.items()
            )
        use = gr.Button("Read it with these columns", elem_id="dataset-columns-use")
    with gr.Column(visible=False, elem_id="dataset-choice") as choice, gr.Row():
        keep = gr.Button("Keep", variant="primary", min_width=120, elem_id="dataset-keep")
        rejects = gr.DownloadButton(
            "Download the rejects", min_width=120, elem_id="dataset-rejects"
        )
        discard = gr.Button("Discard the file", min_width=120, elem_id="dataset-discard")
    panel = AddPanel(
        answer=answer,
        waiting=gr.State(()),
        added=gr.State(""),
        choice=choice,
        keep=keep,
        rejects=rejects,
        columns=columns,
        fields=fields,
    )
    return panel, use, discard


def _wire_arrivals(
    studio: Studio, panel: AddPanel, ids: gr.Textbox, source: gr.Textbox, take: gr.Button
) -> None:
    def take_uploads(text: str, before: Queue, progress: Any = gr.Progress()) -> list[Any]:
        return _take_all(studio, arrivals.from_uploads(studio, text), before, progress)

    def take_source(text: str | None, before: Queue, progress: Any = gr.Progress()) -> list[Any]:
        step = _step(progress, f"Fetching {text}")
        try:
            found = arrivals.from_source(studio, text or "", step)
        except StudioError as error:
            return _answer([], before, show.notice("bad", error.message, error.hint))
        return _take_all(studio, [found], before, progress)

    watched: dict[str, Any] = {"show_progress_on": panel.answer}
    ids.change(shown(take_uploads), [ids, panel.waiting], panel.outputs, **watched)
    for event in (take.click, source.submit):
        event(shown(take_source), [source, panel.waiting], panel.outputs, **watched)


def _wire_decisions(studio: Studio, panel: AddPanel, use: gr.Button, discard: gr.Button) -> None:
    def keep_good(waiting: Queue, progress: Any = gr.Progress()) -> list[Any]:
        first, *others = waiting
        return _decide(studio, first, others, progress, drop_rejected=True)

    def read_columns(waiting: Queue, *names: str, progress: Any = gr.Progress()) -> list[Any]:
        first, *others = waiting
        chosen = zip(COLUMN_TITLES, names, strict=True)
        mapping = arrivals.mapping_of({field: name for field, name in chosen if name})
        return _decide(studio, replace(first, mapping=mapping), others, progress)

    def give_up(waiting: Queue) -> list[Any]:
        first, *others = waiting
        arrivals.discard(studio, first.arrival)
        return _answer([], tuple(others))

    watched: dict[str, Any] = {"show_progress_on": panel.answer}
    panel.keep.click(shown(keep_good), panel.waiting, panel.outputs, **watched)
    use.click(shown(read_columns), [panel.waiting, *panel.fields], panel.outputs, **watched)
    discard.click(shown(give_up), panel.waiting, panel.outputs)


def _step(progress: Any, words: str) -> arrivals.Progress:
    progress(0, desc=words)
    return lambda share: progress(share, desc=words)


def _take_all(studio: Studio, found: Sequence[Arrival], before: Queue, progress: Any) -> list[Any]:
    """Read several files; those with faults wait one behind the other."""
    added, waiting, troubles = [], [], []
    for arrival in found:
        step = _step(progress, f"Reading {arrival.name}")
        try:
            imported = arrivals.take(studio, arrival, progress=step)
        except StudioError as error:
            troubles.append(show.notice("bad", error.message, error.hint))
            continue
        if imported.row is None:
            waiting.append(_waiting(arrival, None, imported))
        else:
            added.append(imported)
    # What came last is what a person looks for.
    return _answer(added, (*waiting, *before), "".join(troubles))


def _decide(
    studio: Studio,
    first: Waiting,
    others: Sequence[Waiting],
    progress: Any,
    *,
    drop_rejected: bool = False,
) -> list[Any]:
    imported = arrivals.take(
        studio,
        first.arrival,
        mapping=first.mapping,
        drop_rejected=drop_rejected,
        progress=_step(progress, f"Reading {first.arrival.name}"),
    )
    if imported.row is None:
        again = _waiting(first.arrival, first.mapping, imported, first.columns)
        return _answer([], (again, *others))
    return _answer([imported], tuple(others))


def _waiting(
    arrival: Arrival,
    mapping: Mapping | None,
    imported: Imported,
    columns: tuple[str, ...] = (),
) -> Waiting:
    return Waiting(
        arrival=arrival,
        mapping=mapping,
        report=imported.report,
        rejects=str(imported.rejects) if imported.rejects else None,
        columns=imported.report.columns or columns,
    )


def _answer(added: Sequence[Imported], waiting: Queue, troubles: str = "") -> list[Any]:
    """Return what the panel shows: what was stored, and the first file that waits."""
    rows = [(imported.row, imported.is_new) for imported in added if imported.row is not None]
    words = troubles + "".join(show_report.welcome(row, is_new=is_new) for row, is_new in rows)
    rows.sort(key=lambda item: item[1])  # a new one, where there is one, is shown
    newest = rows[-1][0].sha256 if rows else gr.skip()
    if not waiting:
        return [words, (), newest, *_no_choice()]
    first, report = waiting[0], waiting[0].report
    behind = [other.arrival.name for other in waiting[1:]]
    words += show_report.rejected(first.arrival.name, report, behind)
    chosen = first.mapping or (guess_mapping(first.columns) if first.columns else None)
    guessed = chosen.model_dump() if chosen else {}
    return [
        words,
        waiting,
        newest,
        gr.Column(visible=True),
        gr.Button(
            f"Keep the {report.num_conversations:,} good, drop {report.num_rejected:,}",
            visible=report.is_salvageable,
        ),
        gr.DownloadButton(value=first.rejects, visible=first.rejects is not None),
        gr.Column(visible=bool(first.columns)),
        *(
            gr.Dropdown(choices=["", *first.columns], value=guessed.get(name) or "")
            for name in COLUMN_TITLES
        ),
    ]


def _no_choice() -> list[Any]:
    return [gr.Column(visible=False), gr.skip(), gr.skip(), gr.Column(visible=False)] + [
        gr.skip() for _ in COLUMN_TITLES
    ]
