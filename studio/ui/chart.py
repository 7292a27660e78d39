"""A live line chart as a component of the page."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from studio.domain.metrics import Point
from studio.ui.look import ASSETS


def chart(title: str, elem_id: str) -> gr.HTML:
    """Create a chart; its value is what `chart_value` returns."""
    return gr.HTML(
        value={"points": []},
        html_template=f'<div class="charttitle">{title}</div><div class="chart"></div>',
        js_on_load=(ASSETS / "chart.js").read_text(encoding="utf-8"),
        elem_id=elem_id,
        container=True,
        padding=True,
    )


def chart_value(name: str, points: Sequence[Point], *, smooth: bool = False) -> dict[str, Any]:
    """Return a Curve in the chart's form."""
    return {
        "name": name,
        "smooth": smooth,
        "points": [[point.step, point.value] for point in points],
    }
