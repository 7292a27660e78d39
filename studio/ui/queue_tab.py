"""Queue: what waits and why, in its order; what the workers do."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import gradio as gr

from studio.domain.moment import parse_moment
from studio.errors import InputError
from studio.services import queue, runs, waiting
from studio.services.studio import Studio
from studio.services.waiting import Overview, Waiting
from studio.ui import show, show_queue
from studio.ui.edge import shown
from studio.ui.live import RAW, Part, changed, plain
from studio.ui.run_actions import chosen

LOOK_SECONDS = 1.5
LOADING = show.empty("Loading ...", "The queue of this studio is read.")


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueTab:
    """Components that other tabs refer to."""

    pick: gr.Radio
    open: gr.Button


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moves:
    """The buttons that act on the chosen Run."""

    first: gr.Button
    up: gr.Button
    down: gr.Button
    hold: gr.Button
    release: gr.Button
    alone: gr.Button
    stop: gr.Button
    open: gr.Button

    @property
    def changing(self) -> list[gr.Button]:
        """Those that a look changes, in the order of `_buttons`."""
        return [self.first, self.up, self.down, self.hold, self.release, self.alone]


@dataclass(frozen=True, kw_only=True, slots=True)
class _When:
    """What says when the chosen Run starts."""

    priority: gr.Textbox
    moment: gr.Textbox
    before: gr.Textbox
    use: gr.Button


def build(studio: Studio) -> QueueTab:
    """Lay out the tab and wire its events."""
    timer = gr.Timer(LOOK_SECONDS)
    seen = gr.State({})
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            head = gr.HTML(LOADING, elem_id="queue-head")
            pick = gr.Radio(
                choices=[],
                label="In the order in which they start",
                elem_classes="picklist",
                elem_id="queue-pick",
                visible=False,
            )
            with gr.Column(visible=False) as tools:
                moves, when = _moves(), _when()
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                pause = gr.Button("Pause the queue", elem_id="queue-pause", size="sm")
                go_on = gr.Button(
                    "Let the queue go on", elem_id="queue-resume", size="sm", visible=False
                )
            gr.Markdown("#### Workers")
            machines = gr.HTML(elem_id="queue-workers")

    outputs = [head, pick, tools, *moves.changing, pause, go_on, machines]

    def look(run_id: int | None, before: dict[str, Any]) -> list[Any]:
        return changed(_parts(waiting.overview(studio), run_id), before)

    quiet: dict[str, Any] = {"show_progress": "hidden", "preprocess": RAW}
    asked, told = [pick, seen], [seen, *outputs]

    def wire(button: gr.Button, act: Callable[..., Any], *inputs: Any) -> Any:
        event = button.click(shown(act), list(inputs), None, preprocess=RAW)
        event.then(shown(look), asked, told, **quiet)
        return event

    gr.on([timer.tick, pick.change], shown(look), asked, told, **quiet)
    wire(pause, lambda: queue.pause(studio, True))
    wire(go_on, lambda: queue.pause(studio, False))
    acts: list[tuple[gr.Button, Callable[[Studio, int], Any]]] = [
        (moves.first, queue.move_first),
        (moves.up, queue.move_up),
        (moves.down, queue.move_down),
        (moves.hold, queue.hold),
        (moves.release, queue.release),
        (moves.stop, runs.stop),
    ]
    for button, act in acts:
        wire(button, partial(_act, studio, act), pick)
    alone = partial(_act, studio, lambda studio, run_id: queue.wait_for(studio, run_id, None))
    waits_for_none = wire(moves.alone, alone, pick)
    fields = [when.priority, when.moment, when.before]
    pick.change(shown(partial(when_of, studio)), pick, fields, **quiet)
    used = wire(when.use, partial(use_when, studio), pick, *fields)
    # What somebody has typed stays where it could not be used.
    for event in (used, waits_for_none):
        event.success(shown(partial(when_of, studio)), pick, fields, **quiet)
    return QueueTab(pick=pick, open=moves.open)


def _moves() -> _Moves:
    small: dict[str, Any] = {"size": "sm", "min_width": 90}
    with gr.Row():
        first = gr.Button("First", elem_id="queue-first", **small)
        up = gr.Button("Up", elem_id="queue-up", **small)
        down = gr.Button("Down", elem_id="queue-down", **small)
        hold = gr.Button("Pause", elem_id="queue-hold", **small)
        release = gr.Button("Resume", elem_id="queue-release", visible=False, **small)
        alone = gr.Button("Start without it", elem_id="queue-alone", visible=False, **small)
        stop = gr.Button("Stop", variant="stop", elem_id="queue-stop", **small)
        open_ = gr.Button("Show the run", elem_id="queue-open", **small)
    return _Moves(
        first=first,
        up=up,
        down=down,
        hold=hold,
        release=release,
        alone=alone,
        stop=stop,
        open=open_,
    )


def _when() -> _When:
    line: dict[str, Any] = {"max_lines": 1, "min_width": 150, "interactive": True}
    with gr.Accordion("When it starts", open=False, elem_id="queue-when"):
        with gr.Row():
            priority = gr.Textbox(
                label="Priority",
                info="-100 to 100; the higher one starts first.",
                elem_id="queue-priority",
                **line,
            )
            moment = gr.Textbox(
                label="Not before",
                info="22:00, 2031-05-17 22:00, or +8h; empty is as soon as it can.",
                elem_id="queue-moment",
                **line,
            )
            before = gr.Textbox(
                label="Behind run",
                info="Number of a run that must have finished; empty is none.",
                elem_id="queue-before",
                **line,
            )
        use = gr.Button("Use this", size="sm", elem_id="queue-use")
    return _When(priority=priority, moment=moment, before=before, use=use)


def _parts(found: Overview, run_id: int | None) -> list[Part]:
    """Return for each output what it depends on, and how to make it."""
    rows = {one.row.id: one for one in found.waiting}
    listed = [
        (show_queue.label(place, one), one.row.id)
        for place, one in enumerate(found.waiting, start=1)
    ]
    picked = run_id if run_id in rows else next(iter(rows), None)
    is_there = picked is not None

    def radio() -> gr.Radio:
        if picked == run_id:
            return gr.Radio(choices=listed, visible=is_there)
        return gr.Radio(choices=listed, value=picked, visible=is_there)

    return [
        plain(show_queue.head(found)),
        ((listed, picked), radio),
        (is_there, lambda: gr.Column(visible=is_there)),
        *_buttons(rows[picked] if picked is not None else None, list(rows)),
        (found.is_paused, lambda: gr.Button(visible=not found.is_paused)),
        (found.is_paused, lambda: gr.Button(visible=found.is_paused)),
        plain(show_queue.machines(found)),
    ]


def _buttons(one: Waiting | None, order: list[int]) -> list[Part]:
    place = order.index(one.row.id) if one is not None else 0
    is_held = one is not None and one.row.is_held
    waits = one is not None and one.row.after_run_id is not None
    is_first, is_last = place == 0, place == len(order) - 1
    return [
        (is_first, lambda: gr.Button(interactive=not is_first)),
        (is_first, lambda: gr.Button(interactive=not is_first)),
        (is_last, lambda: gr.Button(interactive=not is_last)),
        (is_held, lambda: gr.Button(visible=not is_held)),
        (is_held, lambda: gr.Button(visible=is_held)),
        (waits, lambda: gr.Button(visible=waits)),
    ]


def _act(studio: Studio, act: Callable[[Studio, int], Any], run_id: int | None) -> None:
    act(studio, chosen(run_id))


def when_of(studio: Studio, run_id: int | None) -> list[str]:
    """Return what the fields say of the chosen Run."""
    if run_id is None:
        return ["", "", ""]
    row = runs.get(studio, int(run_id))
    moment = "" if row.start_after is None else _written(row.start_after)
    return [str(row.priority), moment, "" if row.after_run_id is None else str(row.after_run_id)]


def _written(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")


def use_when(studio: Studio, run_id: int | None, *said: str | None) -> None:
    """Store what the fields say; all of them are read before anything is stored."""
    number, row = chosen(run_id), runs.get(studio, chosen(run_id))
    # None is what Gradio sends for an empty text box.
    priority, moment, before = ((text or "").strip() for text in said)
    wanted = _whole(priority or "0", "priority")
    other = _whole(before, "run") if before else None
    is_old = row.start_after is not None and moment == _written(row.start_after)
    start = parse_moment(moment) if moment and not is_old else None
    if other != row.after_run_id:
        queue.wait_for(studio, number, other)
    if wanted != row.priority:
        queue.set_priority(studio, number, wanted)
    if not is_old and start != row.start_after:
        queue.start_after(studio, number, start)
    gr.Info(f"Run {number} waits as you said.")


def _whole(text: str, what: str) -> int:
    try:
        return int(text.removeprefix("run").strip())
    except ValueError as error:
        raise InputError(
            f"{text[:40]!r} is not a whole number.",
            f"Write the {what} as in 3.",
            field=what,
        ) from error
