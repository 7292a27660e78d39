"""The box above the Train form that says what a new Run begins from, and what it changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from studio.domain.fork import KEEP_WORDS, Keep, check_same
from studio.domain.spec import JobSpec
from studio.errors import StudioError
from studio.services import checkpoints, forks, runs
from studio.services.studio import Studio
from studio.ui import form, show, show_history
from studio.ui.edge import shown

# {"run", "step", "keep"} of a fork, {"run"} of a clone, None of what begins anew.
Origin = dict[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ForkBox:
    """Components of the box, and what the browser keeps of it."""

    origin: gr.State
    frame: gr.Row
    words: gr.HTML

    @property
    def outputs(self) -> list[Any]:
        """What `opened` and `closed` fill."""
        return [self.origin, self.frame, self.words]


def build() -> ForkBox:
    """Lay out the box, hidden."""
    origin = gr.State(None)
    with gr.Row(visible=False, elem_id="train-origin", elem_classes="forkbox") as frame:
        with gr.Column(scale=12, min_width=240):
            words = gr.HTML(elem_id="train-origin-words")
        cancel = gr.Button(
            "✕ Launch anew instead",
            size="sm",
            scale=1,
            min_width=120,
            elem_id="train-origin-cancel",
        )
    box = ForkBox(origin=origin, frame=frame, words=words)
    cancel.click(shown(closed), None, box.outputs, show_progress="hidden")
    return box


def spec_of(studio: Studio, origin: Origin) -> JobSpec:
    """Return the spec of the Run that a new one begins from.

    Raises:
        NotFoundError: There is no such Run or Checkpoint.
        ConflictError: The spec was written by another version of the studio.
    """
    assert origin is not None
    if "step" in origin:
        checkpoints.get(studio, origin["run"], origin["step"])
    return runs.spec_of(runs.get(studio, origin["run"]))


def opened(studio: Studio, origin: Origin, spec: JobSpec) -> list[Any]:
    """Return what the box shows when it is opened."""
    return [origin, gr.Row(visible=True), words(studio, origin, spec)]


def closed() -> list[Any]:
    """Return what hides the box."""
    return [None, gr.Row(visible=False), ""]


def words_of(
    studio: Studio, leaves: Sequence[form.Leaf], values: Sequence[Any], origin: Origin
) -> Any:
    """Return what the box says of a form; what cannot be told of a wrong form stays."""
    if origin is None:
        return gr.skip()
    try:
        return words(studio, origin, form.to_spec(values, leaves))
    except StudioError:
        return gr.skip()


def words(studio: Studio, origin: Origin, spec: JobSpec) -> str:
    """Return where a new Run begins, what it changes, and what does not go on from there."""
    if origin is None:
        return ""
    before = runs.spec_of(runs.get(studio, origin["run"]))
    trouble = ""
    if "step" in origin:
        title = f"Fork of run {origin['run']} from step {origin['step']}"
        small = KEEP_WORDS[Keep(origin["keep"])]
        try:
            check_same(before, spec)
        except StudioError as error:
            trouble = show.notice("bad", error.message, error.hint)
    else:
        title, small = f"Clone of run {origin['run']}", "its spec, and nothing of what it learned"
    table = show_history.differences(forks.differences(studio, before, spec))
    return f"<b>{escape(title)}</b> <span>({escape(small)})</span>{table}{trouble}"


def launch(studio: Studio, origin: Origin, spec: JobSpec) -> int:
    """Launch what the form and the box say; return the new Run's number.

    Raises:
        StudioError: As `runs.submit` and `forks.fork`.
    """
    if origin is None or "step" not in origin:
        return runs.submit(studio, spec).id
    keep = Keep(origin["keep"])
    return forks.fork(studio, origin["run"], origin["step"], spec, keep=keep).id
