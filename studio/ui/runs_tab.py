"""Runs: state, progress, curves, proofs and log, live; all of it read from the store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from studio.domain.metrics import EVAL_LOSS, GRAD_NORM, LEARNING_RATE, LOSS
from studio.domain.run import RunState
from studio.domain.spec import spec_to_yaml
from studio.errors import NotFoundError
from studio.services import artifacts, runs
from studio.services.studio import Studio
from studio.store.rows import RunRow
from studio.ui import show, show_samples
from studio.ui.chart import chart, chart_value
from studio.ui.edge import shown

LOOK_SECONDS = 1.5
LOADING = show.empty("Loading ...", "The runs of this studio are read.")
EMPTY = show.empty("No run yet", "Choose a dataset and a preset on the Train page and launch.")
CURVES = (LOSS, EVAL_LOSS, LEARNING_RATE, GRAD_NORM)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunsTab:
    """Components that other tabs and the page's start refer to."""

    pick: gr.Radio
    to_merge: gr.Button
    to_chat: gr.Button


def choices(studio: Studio) -> list[tuple[str, int]]:
    """Return the newest Runs as (label, number)."""
    return [(_label(row), row.id) for row in runs.listing(studio)]


def _label(row: RunRow) -> str:
    steps = f" · {row.step}/{row.total_steps}" if row.total_steps else ""
    return f"{row.id} · {row.name}\n{row.state.lower()}{steps} · {show.ago(row.created_at)}"


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
            with gr.Row():
                off: dict[str, Any] = {"interactive": False, "min_width": 90}
                stop = gr.Button("Stop", variant="stop", elem_id="run-stop", **off)
                resume = gr.Button("Resume", elem_id="run-resume", **off)
                to_merge = gr.Button("Merge", elem_id="run-merge", **off)
                to_chat = gr.Button("Chat", elem_id="run-chat", **off)
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
            asked, said, log, spec = _folded()

    charts = [loss, eval_loss, rate, norm]
    outputs = [
        pick,
        head,
        stop,
        resume,
        to_merge,
        to_chat,
        held_out,
        *charts,
        proofs,
        asked,
        said,
        log,
        spec,
    ]

    def look(run_id: int | None, before: dict[str, Any]) -> list[Any]:
        return _changed(_values(studio, run_id), before)

    watching: dict[str, Any] = {"show_progress": "hidden"}
    gr.on([timer.tick, pick.change], shown(look), [pick, seen], [seen, *outputs], **watching)
    pick.change(None, pick, None, js="(run) => window.studio.remember('run', run)")
    stops = _asks(partial(runs.stop, studio), "Run {} stops at its next step.".format)
    resumes = _asks(partial(runs.resume, studio), partial(_resume_words, studio))
    for button, act in ((stop, stops), (resume, resumes)):
        button.click(shown(act), pick, None).then(
            shown(look), [pick, seen], [seen, *outputs], **watching
        )
    return RunsTab(pick=pick, to_merge=to_merge, to_chat=to_chat)


def _resume_words(studio: Studio, run_id: int) -> str:
    checkpoints = runs.folder(studio, run_id).checkpoints
    if next(checkpoints.glob("step-*"), None) is None:
        return f"Run {run_id} has no checkpoint: it starts again from the beginning."
    return f"Run {run_id} goes on from its latest checkpoint."


def _asks(
    act: Callable[[int], object], words: Callable[[int], str]
) -> Callable[[int | None], None]:
    """Return what a button does with the chosen Run; `words` say so, of its number."""

    def ask(run_id: int | None) -> None:
        if run_id is None:
            raise NotFoundError("No run is chosen.", "Choose one in the list.")
        said = words(int(run_id))
        act(int(run_id))
        gr.Info(said)

    return ask


def _folded() -> tuple[gr.Accordion, gr.HTML, gr.Textbox, gr.Code]:
    """Lay out what is folded away at first: sample replies, log and spec."""
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
    return asked, said, log, spec


def _values(studio: Studio, run_id: int | None) -> list[tuple[Any, Any]]:
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
        return [picked, *_nothing()]
    row = runs.get(studio, chosen)
    done = runs.progress(studio, row)
    is_over = RunState(row.state).is_final
    has_result = artifacts.has_result(studio, row)
    curves = runs.curves(studio, row.id, CURVES)
    has_eval = bool(curves[EVAL_LOSS])
    head = show.run_head(row, done)
    found, recalled = runs.proofs(studio, row.id).proofs, runs.recall(studio, row.id)
    stamps = show.proofs(found, recalled, is_over=is_over)
    said = show_samples.samples(runs.samples(studio, row.id))
    log = runs.log_tail(studio, row.id)
    can_stop = row.state in (RunState.QUEUED, RunState.RUNNING)
    can_resume = row.state in (RunState.STOPPED, RunState.FAILED)
    stop_text = "Stopping ..." if row.state == RunState.STOPPING else "Stop"
    return [
        picked,
        (head, lambda: head),
        ((can_stop, stop_text), lambda: gr.Button(stop_text, interactive=can_stop)),
        (can_resume, lambda: gr.Button(interactive=can_resume)),
        (has_result, lambda: gr.Button(interactive=has_result)),
        (has_result, lambda: gr.Button(interactive=has_result)),
        (has_eval, lambda: gr.Column(visible=has_eval)),
        *[_curve(chosen, name, curves[name]) for name in CURVES],
        (stamps, lambda: stamps),
        (bool(said), lambda: gr.Accordion(visible=bool(said))),
        (said, lambda: said),
        (log, lambda: log),
        (chosen, lambda: spec_to_yaml(runs.spec_of(row))),
    ]


def _curve(run_id: int, name: str, points: Sequence[Any]) -> tuple[Any, Any]:
    last = points[-1].step if points else 0
    return (run_id, name, last, len(points)), lambda: chart_value(
        name, points, smooth=name in (LOSS, GRAD_NORM)
    )


def _nothing() -> list[tuple[Any, Any]]:
    off = ("off", lambda: gr.Button(interactive=False))
    blank = ("blank", lambda: chart_value("", []))
    return [
        ("empty", lambda: EMPTY),
        off,
        off,
        off,
        off,
        ("hidden", lambda: gr.Column(visible=False)),
        *[blank for _ in CURVES],
        ("", lambda: ""),
        ("hidden", lambda: gr.Accordion(visible=False)),
        ("", lambda: ""),
        ("", lambda: ""),
        ("", lambda: ""),
    ]


def _changed(values: list[tuple[Any, Any]], before: dict[str, Any]) -> list[Any]:
    """Return only what differs from what this browser shows, so that nothing flickers."""
    now = {str(index): repr(depends) for index, (depends, _) in enumerate(values)}
    if now == before:
        return [gr.skip()] * (len(values) + 1)
    updates = [
        gr.skip() if before.get(str(index)) == now[str(index)] else make()
        for index, (_, make) in enumerate(values)
    ]
    return [now, *updates]
