"""The upload box: several files, drag and drop, pause, resume after a reload."""

import gradio as gr

from studio.ui.look import ASSETS

TEMPLATE = """
<div class="uploads" data-target="{target}">
  <label class="dropzone">
    <input type="file" multiple>
    <b>{label}</b>
    <span>or drop them here</span>
    <small>JSON lines, JSON, Parquet, CSV or text, also in gzip or zip. A large file may be paused,
      and goes on after a reload when you choose it again.</small>
  </label>
  <ul class="uploadlist" aria-label="Uploads"></ul>
  <div class="uploadsay" role="status" aria-live="polite"></div>
</div>
"""


def upload_box(label: str = "Choose files", elem_id: str = "upload") -> tuple[gr.HTML, gr.Textbox]:
    """Place an upload box.

    Args:
        label: What the box asks for; HTML.
        elem_id: Id of the box; the textbox has this id with `-ids` behind it.

    Returns:
        The box, and a hidden textbox: its `change` event comes when uploads are finished and
        nothing is being sent any more (Gradio 6.31 fires `input` only for typed keys); its value is a JSON list of their ids, each id once.
    """
    ids = gr.Textbox(visible="hidden", elem_id=f"{elem_id}-ids", label="Finished uploads")
    box = gr.HTML(
        value="",
        html_template=TEMPLATE.format(target=f"{elem_id}-ids", label=label),
        js_on_load=(ASSETS / "upload.js").read_text(encoding="utf-8"),
        elem_id=elem_id,
        container=True,
        padding=True,
    )
    return box, ids
