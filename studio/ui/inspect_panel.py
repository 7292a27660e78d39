"""The inspector: a conversation token by token, as the trainer feeds it to the chosen model."""

from typing import Any

import gradio as gr

from studio.services import readings
from studio.services.studio import Studio
from studio.ui import reading_choices, show_tokens
from studio.ui.edge import shown
from studio.ui.reading_choices import Choices


def build(studio: Studio, pick: gr.Dropdown, number: gr.Number, choices: Choices) -> gr.HTML:
    """Lay out the inspector and wire its events.

    Args:
        studio: The installation.
        pick: The Dataset.
        number: Which of its records, from 1.
        choices: How it is read.
    """
    view = gr.HTML(elem_id="dataset-tokens")

    def look(sha256: str | None, at: float | None, *values: Any) -> str:
        if not sha256:
            return ""
        model, data = reading_choices.read(values)
        return show_tokens.inspection(
            readings.inspect(studio, sha256, int(at or 1) - 1, model, data)
        )

    changes = [number.change, pick.change, choices.cutoff.submit, choices.cutoff.blur]
    changes += [field.change for field in choices.components if field is not choices.cutoff]  # type: ignore[attr-defined]
    gr.on(
        changes,
        shown(look),
        [pick, number, *choices.components],
        view,
        show_progress="hidden",
        trigger_mode="always_last",
    )
    return view
