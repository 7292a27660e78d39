"""What can be done with the chosen Run: its buttons, which of them work now, and what they do."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from studio.domain.run import RunState, Wish
from studio.errors import NotFoundError
from studio.services import artifacts, runs
from studio.services.studio import Studio
from studio.store.rows import RunRow
from studio.ui.edge import shown
from studio.ui.live import RAW, Part


@dataclass(frozen=True, kw_only=True, slots=True)
class RunActions:
    """The buttons above a Run."""

    pause: gr.Button
    resume: gr.Button
    stop: gr.Button
    merge: gr.Button
    chat: gr.Button
    save: gr.Button
    evaluate: gr.Button
    fork: gr.Button
    clone: gr.Button

    @property
    def buttons(self) -> list[gr.Button]:
        """All of them, in the order of `parts`."""
        return [
            self.pause,
            self.resume,
            self.stop,
            self.merge,
            self.chat,
            self.save,
            self.evaluate,
            self.fork,
            self.clone,
        ]


def build() -> RunActions:
    """Lay out the buttons."""
    off: dict[str, Any] = {"interactive": False, "min_width": 90}
    small: dict[str, Any] = {**off, "size": "sm"}
    with gr.Row():
        pause = gr.Button("Pause", elem_id="run-pause", **off)
        resume = gr.Button("Resume", elem_id="run-resume", visible=False, **off)
        stop = gr.Button("Stop", variant="stop", elem_id="run-stop", **off)
        merge = gr.Button("Merge", elem_id="run-merge", **off)
        chat = gr.Button("Chat", elem_id="run-chat", **off)
    with gr.Row():
        save = gr.Button("Save now", elem_id="run-save", **small)
        evaluate = gr.Button("Evaluate now", elem_id="run-evaluate", **small)
        fork = gr.Button("Fork", elem_id="run-fork", **small)
        clone = gr.Button("Clone", elem_id="run-clone", **small)
    return RunActions(
        pause=pause,
        resume=resume,
        stop=stop,
        merge=merge,
        chat=chat,
        save=save,
        evaluate=evaluate,
        fork=fork,
        clone=clone,
    )


def parts(studio: Studio, row: RunRow | None, *, has_checkpoint: bool) -> list[Part]:
    """Return what each button shows for a Run."""
    if row is None:
        return [(("off",), partial(gr.Button, interactive=False))] * 9
    state = RunState(row.state)
    can_resume = state in (RunState.STOPPED, RunState.FAILED) or row.is_held
    can_pause = state is RunState.RUNNING or (state is RunState.QUEUED and not row.is_held)
    is_pausing = state is RunState.STOPPING and row.wish == Wish.PAUSE
    can_stop = state in (RunState.QUEUED, RunState.RUNNING) or is_pausing
    has_result = artifacts.has_result(studio, row)
    is_running = state is RunState.RUNNING
    can_evaluate = is_running and runs.has_evaluation(row)
    is_stopping = state is RunState.STOPPING and not is_pausing
    return [
        _button(can_pause, "Pausing ..." if is_pausing else "Pause", visible=not can_resume),
        _button(can_resume, "Resume", visible=can_resume),
        _button(can_stop, "Stopping ..." if is_stopping else "Stop"),
        _button(has_result, "Merge"),
        _button(has_result, "Chat"),
        _button(is_running, "Save now"),
        _button(can_evaluate, "Evaluate now"),
        _button(has_checkpoint, "Fork"),
        _button(True, "Clone"),
    ]


def _button(works: bool, text: str, *, visible: bool = True) -> Part:
    make = partial(gr.Button, text, interactive=works, visible=visible)
    return (works, text, visible), make


def wire(
    studio: Studio,
    actions: RunActions,
    pick: gr.Radio,
    then: Callable[[Any], Any],
) -> None:
    """Let the buttons that act on the Run itself do so; `then` is called with each event."""
    acts: list[tuple[gr.Button, Callable[[int], object], Callable[[int], str]]] = [
        (actions.pause, partial(runs.pause, studio), "Run {} is asked to pause.".format),
        (actions.resume, partial(runs.resume, studio), partial(_resume_words, studio)),
        (actions.stop, partial(runs.stop, studio), "Run {} is asked to stop.".format),
        (
            actions.save,
            partial(runs.save_now, studio),
            "Run {} saves a checkpoint at its next step.".format,
        ),
        (
            actions.evaluate,
            partial(runs.evaluate_now, studio),
            "Run {} evaluates at its next step.".format,
        ),
    ]
    for button, act, words in acts:
        then(button.click(shown(_asks(act, words)), pick, None, preprocess=RAW))


def chosen(run_id: int | None) -> int:
    """Return the number of the chosen Run.

    Raises:
        NotFoundError: None is chosen.
    """
    if run_id is None:
        raise NotFoundError("No run is chosen.", "Choose one in the list.")
    return int(run_id)


def _asks(
    act: Callable[[int], object], words: Callable[[int], str]
) -> Callable[[int | None], None]:
    """Return what a button does with the chosen Run; `words` say so, of its number."""

    def ask(run_id: int | None) -> None:
        number = chosen(run_id)
        said = words(number)
        act(number)
        gr.Info(said)

    return ask


def _resume_words(studio: Studio, run_id: int) -> str:
    if runs.get(studio, run_id).is_held:
        return f"Run {run_id} goes on when it is its turn."
    checkpoints = runs.folder(studio, run_id).checkpoints
    if next(checkpoints.glob("step-*"), None) is None:
        return f"Run {run_id} has no checkpoint: it starts again from the beginning."
    return f"Run {run_id} goes on from its latest checkpoint."
