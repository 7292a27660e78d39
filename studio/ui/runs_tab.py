"""Runs: state, progress, curves, proofs, Checkpoints, history and log, live, from the store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.domain.metrics import EVAL_LOSS, GRAD_NORM, LEARNING_RATE, LOSS
from studio.domain.run import RunState
from studio.domain.spec import spec_to_yaml
from studio.services import checkpoints, forks, run_files, runs, waiting
from studio.services.studio import Studio
from studio.store.rows import RunRow
from studio.ui import checkpoint_list, run_actions, show, show_history, show_samples
from studio.ui.chart import chart, chart_value
from studio.ui.checkpoint_list import CheckpointList
from studio.ui.edge import shown
from studio.ui.live import RAW, Part, changed, plain
from studio.ui.run_actions import RunActions

LOOK_SECONDS = 1.5
LOADING = show.empty("Loading ...", "The runs of this studio are read.")
EMPTY = show.empty("No run yet", "Choose a dataset and a preset on the Train page and launch.")
CURVES = (LOSS, EVAL_LOSS, LEARNING_RATE, GRAD_NORM)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunsTab:
    """Components that other tabs and the page's start refer to."""

    pick: gr.Radio
    actions: RunActions
    checkpoints: CheckpointList


@dataclass(frozen=True, kw_only=True, slots=True)
class _Folded:
    """What is folded away at first."""

    happened: gr.Accordion
    history: gr.HTML
    asked: gr.Accordion
    said: gr.HTML
    log: gr.Textbox
    spec: gr.Code


def choices(studio: Studio) -> list[tuple[str, int]]:
    """Return the newest Runs as (label, number)."""
    return [(_label(row), row.id) for row in runs.listing(studio)]


def _label(row: RunRow) -> str:
    steps = f" · {row.step}/{row.total_steps}" if row.total_steps else ""
    state = runs.state_of(row).lower()
    return f"{row.id} · {row.name}\n{state}{steps} · {show.ago(row.created_at)}"


def build(studio: Studio) -> RunsTab:
    """Lay out the tab and wire its events."""
    timer = gr.Timer(LOOK_SECONDS)
    seen = gr.State({})
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            pick = gr.Radio(
                choices=[], label="Runs, newest first", elem_classes="picklist", elem_id="run-pick"
            )
        with gr.Column(scale=3, min_width=320):
            head = gr.HTML(LOADING, elem_id="run-head")
            actions = run_actions.build()
            saved = checkpoint_list.build()
            proofs = gr.HTML(elem_id="run-proofs")
            loss = chart("Loss (nats per supervised token)", "chart-loss")
            with gr.Column(visible=False) as held_out:
                eval_loss = chart(
                    "Loss on what is not trained on (nats per supervised token)", "chart-eval-loss"
                )
            with gr.Row():
                with gr.Column(min_width=280):
                    rate = chart("Learning rate", "chart-learning-rate")
                with gr.Column(min_width=280):
                    norm = chart("Gradient norm before clipping", "chart-grad-norm")
            folded = _folded()

    charts = [loss, eval_loss, rate, norm]
    end = [folded.happened, folded.history, folded.asked, folded.said, folded.log, folded.spec]
    outputs = [pick, head, *actions.buttons, *saved.outputs, held_out, *charts, proofs, *end]

    def look(run_id: int | None, step: int | None, before: dict[str, Any]) -> list[Any]:
        return changed(_parts(studio, run_id, step), before)

    watching: dict[str, Any] = {"show_progress": "hidden", "preprocess": RAW}
    asked, told = [pick, saved.step, seen], [seen, *outputs]
    gr.on([timer.tick, pick.change], shown(look), asked, told, **watching)
    pick.change(None, pick, None, js="(run) => window.studio.remember('run', run)")
    run_actions.wire(
        studio, actions, pick, lambda event: event.then(shown(look), asked, told, **watching)
    )
    actions.fork.click(lambda: gr.Accordion(open=True), None, saved.frame, show_progress="hidden")
    return RunsTab(pick=pick, actions=actions, checkpoints=saved)


def _folded() -> _Folded:
    """Lay out what is folded away at first: history, sample replies, log and spec."""
    with gr.Accordion("What happened", open=False, elem_id="run-happened") as happened:
        history = gr.HTML(elem_id="run-history")
    with gr.Accordion("Sample replies", open=False, visible=False) as asked:
        said = gr.HTML(elem_id="run-samples")
    with gr.Accordion("Log", open=False):
        log = gr.Textbox(
            show_label=False,
            lines=14,
            max_lines=14,
            interactive=False,
            autoscroll=True,
            elem_classes="log",
            elem_id="run-log",
            container=False,
        )
    with gr.Accordion("Spec", open=False):
        spec = gr.Code(
            language="yaml",
            interactive=False,
            show_label=False,
            buttons=["copy"],
            elem_id="run-spec",
        )
    return _Folded(happened=happened, history=history, asked=asked, said=said, log=log, spec=spec)


def _parts(studio: Studio, run_id: int | None, step: int | None) -> list[Part]:
    """Return for each output what it depends on, and how to make it."""
    listed = choices(studio)
    known = [number for _, number in listed]
    chosen = run_id if run_id in known else (known[0] if known else None)

    def pick() -> gr.Radio:
        # A choice that stands is not sent again: it may have changed while this look was on its way.
        if chosen == run_id:
            return gr.Radio(choices=listed)
        return gr.Radio(choices=listed, value=chosen)

    picked = (("pick", listed, chosen), pick)
    if chosen is None:
        return [picked, *_nothing(studio)]
    row = runs.get(studio, chosen)
    saved = checkpoints.listing(studio, chosen)
    curves = runs.curves(studio, row.id, CURVES)
    has_eval = bool(curves[EVAL_LOSS])
    found, recalled = run_files.proofs(studio, row.id).proofs, run_files.recall(studio, row.id)
    said = show_samples.samples(run_files.samples(studio, row.id))
    events = runs.history(studio, chosen)
    is_open = show_history.ends_with_fault(events)
    return [
        picked,
        plain(_head(studio, row, events)),
        *run_actions.parts(studio, row, has_checkpoint=bool(saved)),
        *checkpoint_list.parts(chosen, saved, step),
        (has_eval, lambda: gr.Column(visible=has_eval)),
        *[_curve(chosen, name, curves[name]) for name in CURVES],
        plain(show.proofs(found, recalled, is_over=RunState(row.state).is_final)),
        # A new fault unfolds it; what somebody has folded or unfolded since then stays so.
        ((chosen, show_history.last_fault(events)), lambda: gr.Accordion(open=is_open)),
        plain(show_history.history(events)),
        (bool(said), lambda: gr.Accordion(visible=bool(said))),
        plain(said),
        plain(run_files.log_tail(studio, row.id)),
        (chosen, lambda: spec_to_yaml(runs.spec_of(row))),
    ]


def _head(studio: Studio, row: RunRow, events: Sequence[Any]) -> str:
    why = waiting.why(studio, row.id) if row.state == RunState.QUEUED else ""
    head = show.run_head(row, runs.progress(studio, row), why)
    if row.state != RunState.FAILED:
        head += show_history.recovery(events)
    return head + show_history.lineage(row, forks.lineage_of(studio, row.id))


def _curve(run_id: int, name: str, points: Sequence[Any]) -> Part:
    last = points[-1].step if points else 0
    return (run_id, name, last, len(points)), lambda: chart_value(
        name, points, smooth=name in (LOSS, GRAD_NORM)
    )


def _nothing(studio: Studio) -> list[Part]:
    return [
        plain(EMPTY),
        *run_actions.parts(studio, None, has_checkpoint=False),
        *checkpoint_list.parts(None, [], None),
        ("hidden", lambda: gr.Column(visible=False)),
        *[("blank", lambda: chart_value("", [])) for _ in CURVES],
        plain(""),
        ("folded", lambda: gr.Accordion(open=False)),
        plain(""),
        ("hidden", lambda: gr.Accordion(visible=False)),
        plain(""),
        plain(""),
        plain(""),
    ]
