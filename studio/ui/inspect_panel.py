"""The inspector: a conversation token by token, as the trainer feeds it to the chosen model."""

from typing import Any

import gradio as gr

from studio.errors import StudioError
from studio.services import readings
from studio.services.studio import Studio
from studio.ui import reading_choices, show, show_tokens
from studio.ui.browse_panel import Place
from studio.ui.edge import shown
from studio.ui.reading_choices import Choices


def build(studio: Studio, place: gr.State, choices: Choices) -> None:
    """Lay out the inspector and wire its events.

    Args:
        studio: The installation.
        place: The record that is shown.
        choices: How it is read.
    """
    view = gr.HTML(elem_id="dataset-tokens")

    def look(place: Place, *values: Any) -> str:
        sha256, at = place
        if not sha256:
            return ""
        try:
            model, data = reading_choices.read(values)
            found = readings.inspect(studio, sha256, at - 1, model, data)
        except StudioError as error:
            # In the panel itself: the tokens of another record or model must not stay there.
            return show.notice("bad", error.message, error.hint)
        return show_tokens.inspection(found, data.cut)

    changes = [place.change, choices.cutoff.submit, choices.cutoff.blur]
    changes += [field.change for field in choices.components if field is not choices.cutoff]  # type: ignore[attr-defined]
    gr.on(
        changes,
        shown(look),
        [place, *choices.components],
        view,
        show_progress="hidden",
        trigger_mode="always_last",
    )
