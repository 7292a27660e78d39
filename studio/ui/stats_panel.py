"""A Dataset in a model's own tokens: lengths against a cutoff, and what the cutoff costs."""

from functools import partial
from typing import Any

import gradio as gr

from studio.errors import StudioError
from studio.services import readings
from studio.services.studio import Studio
from studio.ui import reading_choices, show, show_stats
from studio.ui.edge import shown
from studio.ui.reading_choices import Choices

FIRST = show.empty("Not counted yet", "Choose a model and count: a second for a small Dataset.")


def build(studio: Studio, pick: gr.Dropdown, choices: Choices) -> gr.HTML:
    """Lay out the statistics and wire their events."""
    count = gr.Button("Count the tokens", elem_id="stats-count")
    figures = gr.HTML(FIRST, elem_id="dataset-stats")

    def counted(sha256: str | None, *values: Any, progress: Any = gr.Progress()) -> str:
        step = partial(progress, desc="Tokenising")
        try:
            model, data = reading_choices.read(values)
            found = readings.statistics(studio, sha256 or "", model, data, progress=step)
        except StudioError as error:
            return show.notice("bad", error.message, error.hint)
        return show_stats.statistics(found, model.id)

    count.click(shown(counted), [pick, *choices.components], figures, show_progress_on=figures)
    pick.change(lambda: FIRST, None, figures, show_progress="hidden")
    return figures
