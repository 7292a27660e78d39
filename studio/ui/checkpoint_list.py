"""The Checkpoints of a Run, one of which a fork begins from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.domain.fork import Keep
from studio.services.checkpoints import Checkpoint
from studio.ui import show
from studio.ui.live import Part

KEEPS = [
    ("Everything: weights, optimizer and data order go on", Keep.EVERYTHING.value),
    ("Only the weights: steps and optimizer begin anew", Keep.WEIGHTS.value),
]
NONE_YET = show.empty(
    "No checkpoint yet", "A run saves one when it stops or ends, as its spec says, or on Save now."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointList:
    """Components that the Runs tab fills, and that lead to a fork."""

    frame: gr.Accordion
    none: gr.HTML
    step: gr.Radio
    keep: gr.Radio
    fork: gr.Button

    @property
    def outputs(self) -> list[Any]:
        """What `parts` fills, in its order."""
        return [self.frame, self.none, self.step, self.keep, self.fork]


def build() -> CheckpointList:
    """Lay out the list, folded away."""
    with gr.Accordion("Checkpoints", open=False, elem_id="run-checkpoints") as frame:
        none = gr.HTML(NONE_YET)
        step = gr.Radio(
            choices=[],
            label="Newest first",
            elem_classes="picklist",
            elem_id="run-step",
            visible=False,
        )
        keep = gr.Radio(
            choices=KEEPS,
            value=Keep.EVERYTHING.value,
            label="What a fork takes over",
            elem_id="run-keep",
            visible=False,
        )
        fork = gr.Button(
            "Fork from this checkpoint", size="sm", elem_id="run-fork-here", visible=False
        )
    return CheckpointList(frame=frame, none=none, step=step, keep=keep, fork=fork)


def parts(run_id: int | None, found: Sequence[Checkpoint], chosen: int | None) -> list[Part]:
    """Return what the list shows; a choice that stands is kept."""
    listed = [(_label(one), one.step) for one in found]
    known = [step for _, step in listed]
    step = chosen if chosen in known else (known[0] if known else None)
    is_there = bool(known)
    title = f"Checkpoints · {len(known)}" if known else "Checkpoints"

    def radio() -> gr.Radio:
        if step == chosen:
            return gr.Radio(choices=listed, visible=is_there)
        return gr.Radio(choices=listed, value=step, visible=is_there)

    return [
        (title, lambda: gr.Accordion(label=title)),
        (is_there, lambda: gr.HTML(visible=not is_there)),
        ((run_id, listed, step), radio),
        (is_there, lambda: gr.Radio(visible=is_there)),
        (is_there, lambda: gr.Button(visible=is_there)),
    ]


def _label(one: Checkpoint) -> str:
    words = [f"step {one.step:,}", show.size(one.size_bytes), show.ago(one.saved_at)]
    if one.evaluation_loss is not None:
        words.insert(1, f"evaluation loss {one.evaluation_loss:.4f}")
    return " · ".join(words) + (" · ★ best" if one.is_best else "")
