"""Train: choose, see what it means in parameters, launch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from studio.domain.spec import JobSpec
from studio.errors import EngineError, InputError
from studio.services import datasets, kernels, readings, runs
from studio.services.studio import Studio
from studio.ui import fork_box, form, show, show_kernels, show_stats
from studio.ui.datasets_tab import choices
from studio.ui.edge import shown
from studio.ui.fork_box import ForkBox
from studio.ui.train_figures import derive, fill

EVAL_DATASET = "data.eval_dataset"
NO_DATASET = ("none", "")
SIMPLE = ("data.dataset", "preset", "lora.targets", "train.epochs")
MAX_SPEC_BYTES = 256 * 1024
# Gradio refuses ticks that stood before the choices followed another model, in words about Python
# types; as they are, they reach the spec, which says what the model does not have.
RAW = False
# More of the conversations than this are not dropped without asking.
MAX_SILENT_LOSS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTab:
    """Components that other tabs and the page's start refer to."""

    dataset: gr.Dropdown
    eval_dataset: gr.Dropdown
    mode: gr.Radio
    fields: list[gr.components.Component]
    derived: list[gr.components.Component]
    box: ForkBox
    launched: gr.State


def build(studio: Studio) -> TrainTab:
    """Lay out the tab and wire its events."""
    leaves = form.leaves()
    by_key: dict[str, gr.components.Component] = {}
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            plain: dict[str, Any] = {"show_label": False, "container": False}
            mode = gr.Radio(["Simple", "Advanced"], value="Simple", elem_id="train-mode", **plain)
            box = fork_box.build()
            wrong = gr.HTML(elem_id="train-wrong")
            _simple_fields(studio, leaves, by_key)
            with gr.Column(visible=False, elem_id="train-advanced") as advanced:
                _advanced_fields(leaves, by_key)
        with gr.Column(scale=2, min_width=320):
            card = gr.HTML(elem_id="preset-card")
            total = gr.HTML(elem_id="train-total")
            budget = gr.HTML(elem_id="train-budget")
            count = gr.Button("Count tokens and steps", size="sm", elem_id="train-count")
            epoch = gr.HTML(elem_id="train-epoch")
            trouble = gr.HTML(elem_id="train-trouble")
            launch = gr.Button("Launch", variant="primary", elem_id="train-launch")
            with gr.Accordion("What is trained, layer by layer", open=False):
                tree = gr.HTML(elem_id="train-targets")
            yaml, apply, load, download = _yaml_box()
            _kernels_box()
    launched, accepted = gr.State(0), gr.State("")
    fields = [by_key[leaf.key] for leaf in leaves]
    said = [card, total, trouble, yaml, download, epoch, tree, budget, wrong]
    derived = [by_key["lora.targets"], *said]

    mode.change(lambda name: gr.Column(visible=name == "Advanced"), mode, advanced)
    _wire_fields(studio, leaves, by_key, derived, box)
    _wire_yaml(studio, leaves, [*fields, *derived], (yaml, apply, load), box)

    given, outputs = [*fields, box.origin, accepted], [launched, accepted, trouble, *box.outputs]
    launch.click(shown(partial(_launch, studio, leaves)), given, outputs, preprocess=RAW)
    counted = shown(partial(_counted, studio, leaves))
    count.click(counted, fields, epoch, show_progress_on=epoch, preprocess=RAW)
    return TrainTab(
        dataset=by_key["data.dataset"],  # type: ignore[arg-type]
        eval_dataset=by_key[EVAL_DATASET],  # type: ignore[arg-type]
        mode=mode,
        fields=fields,
        derived=derived,
        box=box,
        launched=launched,
    )


def _launch(
    studio: Studio, leaves: Sequence[form.Leaf], *values: Any, progress: Any = gr.Progress()
) -> list[Any]:
    """Launch, unless something has to be confirmed first; return the Run's number and what stays."""
    *typed, origin, known = values
    spec = form.to_spec(typed, leaves)
    loss = "" if known == spec.model_dump_json() else _loss(studio, spec, progress)
    if loss:
        return [gr.skip(), spec.model_dump_json(), loss, *[gr.skip()] * 3]
    return [fork_box.launch(studio, origin, spec), "", gr.skip(), *fork_box.closed()]


def _counted(
    studio: Studio, leaves: Sequence[form.Leaf], *values: Any, progress: Any = gr.Progress()
) -> str:
    spec = form.to_spec(values, leaves)
    step = partial(progress, desc="Tokenising")
    return show_stats.plan(readings.plan(studio, spec, step), spec.data)


def _loss(studio: Studio, spec: JobSpec, progress: Any) -> str:
    """Return what has to be confirmed before the launch: that truncation drops conversations.

    A run that refuses long examples says so itself, and so does one whose model is not at hand.
    """
    if spec.data.truncation == "refuse" or not spec.data.dataset:
        return ""
    try:
        plan = readings.plan(studio, spec, partial(progress, desc="Tokenising"))
    except EngineError:
        return ""
    kept = plan.mixture.total.conversations
    if plan.num_nothing_left <= MAX_SILENT_LOSS * (kept + plan.num_nothing_left):
        return ""
    return show.notice(
        "bad",
        f"{plan.num_nothing_left:,} conversations keep nothing that could be learned at "
        f"{spec.data.max_length_tokens:,} tokens.",
        "Raise the longest example, or launch again to train on the others.",
    )


def _yaml_box() -> tuple[gr.Code, gr.Button, gr.UploadButton, gr.DownloadButton]:
    """Lay out the spec as YAML, folded away."""
    with gr.Accordion("The spec as YAML", open=False):
        yaml = gr.Code(
            language="yaml",
            interactive=True,
            lines=12,
            max_lines=24,
            show_label=False,
            buttons=["copy", "download"],
            elem_id="train-yaml",
        )
        with gr.Row():
            apply = gr.Button("Use this YAML", size="sm", elem_id="train-yaml-apply")
            load = gr.UploadButton("Load a file", size="sm", elem_id="train-yaml-load")
            download = gr.DownloadButton("Download", size="sm", elem_id="train-yaml-download")
    return yaml, apply, load, download


def _kernels_box() -> None:
    """Lay out what tries the kernels of this machine, folded away."""
    with gr.Accordion("Kernels of this machine", open=False):
        gr.Markdown(
            "Fast code that a GPU needs, each piece compared with plain arithmetic on this "
            "machine; a run does the same before its first step.",
        )
        button = gr.Button("Try them now", size="sm", elem_id="kernels-try")
        found = gr.HTML(elem_id="kernels")
    button.click(shown(lambda: show_kernels.kernels(kernels.measure())), None, found)


def _wire_fields(
    studio: Studio,
    leaves: Sequence[form.Leaf],
    by_key: dict[str, gr.components.Component],
    derived: list[gr.components.Component],
    box: ForkBox,
) -> None:
    """Let a preset fill the form, and every change show what it means."""
    fields = [by_key[leaf.key] for leaf in leaves]

    def derived_of(*values: Any) -> list[Any]:
        *typed, origin = values
        return [*derive(studio, leaves, typed), fork_box.words_of(studio, leaves, typed, origin)]

    def take_preset(*values: Any) -> list[Any]:
        *typed, origin = values
        named = dict(zip((leaf.key for leaf in leaves), typed, strict=True))
        kept = {"data": {"dataset": named["data.dataset"] or ""}, "name": named["name"]}
        spec = runs.spec_from_preset(studio, named["preset"], kept)
        return [*fill(studio, leaves, spec), fork_box.words(studio, origin, spec)]

    quiet: dict[str, Any] = {"show_progress": "hidden", "preprocess": RAW}
    preset = by_key["preset"]
    given, outputs = [*fields, box.origin], [*derived, box.words]
    preset.input(shown(take_preset), given, [*fields, *outputs], **quiet)  # type: ignore[attr-defined]
    changes = [field.input for field in fields if field is not preset]  # type: ignore[attr-defined]
    # A text box tells of typing, but not of pasting; leaving it tells of both.
    changes += [field.blur for field in fields if isinstance(field, gr.Textbox)]
    gr.on(changes, shown(derived_of), given, outputs, trigger_mode="always_last", **quiet)


def _wire_yaml(
    studio: Studio,
    leaves: Sequence[form.Leaf],
    everything: list[gr.components.Component],
    widgets: tuple[gr.Code, gr.Button, gr.UploadButton],
    box: ForkBox,
) -> None:
    """Let a spec be pasted or loaded as YAML."""
    yaml, apply, load = widgets

    def take_yaml(text: str, origin: fork_box.Origin) -> list[Any]:
        spec = _with_known_dataset(studio, runs.complete_spec(studio, text))
        return [*fill(studio, leaves, spec), fork_box.words(studio, origin, spec)]

    def take_file(path: str, origin: fork_box.Origin) -> list[Any]:
        if Path(path).stat().st_size > MAX_SPEC_BYTES:
            raise InputError("The file is larger than any spec.", "Load a YAML file of a JobSpec.")
        return take_yaml(Path(path).read_text(encoding="utf-8", errors="replace"), origin)

    apply.click(shown(take_yaml), [yaml, box.origin], [*everything, box.words])
    load.upload(shown(take_file), [load, box.origin], [*everything, box.words])


def start_values(studio: Studio) -> list[Any]:
    """Return what fields and derived components show when the page opens."""
    found = choices(studio)
    dataset = found[0][1] if found else ""
    first = next(iter(studio.presets))
    return _values(studio, runs.spec_from_preset(studio, first, {"data": {"dataset": dataset}}))


def opened(studio: Studio, origin: fork_box.Origin) -> list[Any]:
    """Return what mode, fields, derived components and box show for a fork or a clone.

    Raises:
        NotFoundError: There is no such Run or Checkpoint.
        ConflictError: Its spec was written by another version of the studio.
    """
    spec = fork_box.spec_of(studio, origin)
    return ["Advanced", *_values(studio, spec), *fork_box.opened(studio, origin, spec)]


def _values(studio: Studio, spec: JobSpec) -> list[Any]:
    leaves = form.leaves()
    found = choices(studio)
    values = fill(studio, leaves, spec)
    keys = [leaf.key for leaf in leaves]
    values[keys.index("data.dataset")] = gr.Dropdown(choices=found, value=spec.data.dataset or None)
    values[keys.index(EVAL_DATASET)] = gr.Dropdown(
        choices=[NO_DATASET, *found], value=spec.data.eval_dataset
    )
    return values


def _simple_fields(
    studio: Studio, leaves: Sequence[form.Leaf], by_key: dict[str, gr.components.Component]
) -> None:
    leaf_of = {leaf.key: leaf for leaf in leaves}
    by_key["data.dataset"] = gr.Dropdown(
        choices=[],
        label="1 · Dataset",
        info="What the model learns from.",
        elem_id="field-data-dataset",
        interactive=True,
    )
    by_key["preset"] = gr.Dropdown(
        choices=[(preset.title, name) for name, preset in studio.presets.items()],
        label="2 · Preset",
        info="A set of choices for one model, with their source.",
        elem_id="field-preset",
        interactive=True,
    )
    by_key["lora.targets"] = gr.CheckboxGroup(
        choices=[],
        label="3 · LoRA targets",
        info=leaf_of["lora.targets"].field.description,
        elem_id="field-lora-targets",
        interactive=True,
    )
    by_key["train.epochs"] = gr.Textbox(
        label="4 · Epochs",
        info=leaf_of["train.epochs"].field.description,
        max_lines=1,
        elem_id="field-train-epochs",
        interactive=True,
    )


def _advanced_fields(
    leaves: Sequence[form.Leaf], by_key: dict[str, gr.components.Component]
) -> None:
    remaining = [leaf for leaf in leaves if leaf.key not in SIMPLE]
    make = {EVAL_DATASET: _dataset_component}
    with gr.Row():
        for leaf in remaining:
            if len(leaf.path) == 1:
                by_key[leaf.key] = form.component(leaf)
    sections = dict.fromkeys(leaf.path[0] for leaf in remaining if len(leaf.path) > 1)
    for section in sections:
        with gr.Accordion(form.section_title(section), open=section in ("lora", "optim")):
            with gr.Row():
                for leaf in remaining:
                    if len(leaf.path) > 1 and leaf.path[0] == section:
                        by_key[leaf.key] = make.get(leaf.key, form.component)(leaf)


def _dataset_component(leaf: form.Leaf) -> gr.components.Component:
    return gr.Dropdown(
        choices=[NO_DATASET],
        value="",
        label=leaf.title,
        info=leaf.field.description,
        interactive=True,
        min_width=200,
        elem_id=f"field-{leaf.key.replace('.', '-')}",
    )


def _with_known_dataset(studio: Studio, spec: JobSpec) -> JobSpec:
    """Return the spec with the Datasets of the form's lists named by content hash."""
    names = {"dataset": spec.data.dataset, "eval_dataset": spec.data.eval_dataset}
    known = {field: datasets.get(studio, name).sha256 for field, name in names.items() if name}
    return spec.model_copy(update={"data": spec.data.model_copy(update=known)})
