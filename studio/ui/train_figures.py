"""What a spec means, beside the form: target choices, figures, tree, memory, YAML."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from studio.domain.preset import find_preset
from studio.domain.spec import JobSpec, spec_to_yaml
from studio.domain.targets import GROUP_TITLES, TargetGroup
from studio.errors import StudioError
from studio.services import budgets, mixtures, models
from studio.services.studio import Studio
from studio.ui import form, show, show_budget, show_targets


def fill(studio: Studio, leaves: Sequence[form.Leaf], spec: JobSpec) -> list[Any]:
    """Return what fields and derived components show for a spec."""
    values = form.to_values(spec, leaves)
    return [*values, *derive(studio, leaves, values)]


def derive(studio: Studio, leaves: Sequence[form.Leaf], values: Sequence[Any]) -> list[Any]:
    """Return what the values of the form mean, in the order of TrainTab.derived.

    That is: target choices, card, total, trouble, YAML, download, epoch, tree and budget.
    """
    named = dict(zip((leaf.key for leaf in leaves), values, strict=True))
    card = show.preset(find_preset(studio.presets, named["preset"])) if named["preset"] else ""
    try:
        spec = form.to_spec(values, leaves)
        counts = models.parameters_by_group(studio, spec)
        models.check_targets(studio, spec)
        if spec.data.dataset:
            mixtures.for_training(studio, spec)
        tree = models.tree_of(studio, spec.model.id, spec.lora, spec.model.revision)
        estimate = budgets.budget_of(studio, spec)
    except StudioError as error:
        trouble = show.notice("bad", error.message, error.hint)
        return [gr.skip(), card, "", trouble, gr.skip(), gr.skip(), "", "", ""]
    text = spec_to_yaml(spec)
    total = _unknown() if tree is None else _total(spec, tree.selected_parameters)
    choices = gr.CheckboxGroup(
        choices=_target_choices(counts), value=[group.value for group in spec.lora.targets]
    )
    is_all = spec.method == "full"
    shown_tree = "All weights of the text model train." if is_all else ""
    if tree is not None and not is_all:
        shown_tree = show_targets.targets(tree)
    memory = _no_gpu(spec) + show_budget.estimate(estimate)
    download = gr.DownloadButton(value=_yaml_file(text))
    # What was counted before is of another spec.
    counted = ""
    return [choices, card, total, "", text, download, counted, shown_tree, memory]


def _no_gpu(spec: JobSpec) -> str:
    if not spec.train.num_gpus or budgets.cards_here():
        return ""
    wanted = "a GPU" if spec.train.num_gpus == 1 else f"{spec.train.num_gpus} GPUs"
    return show.notice(
        "info",
        f"This run asks for {wanted}, and this machine shows none.",
        "It will fail here; a tiny preset trains on the CPU.",
    )


def _target_choices(counts: dict[TargetGroup, int] | None) -> list[tuple[str, str]]:
    if counts is None:
        return [(f"{GROUP_TITLES[group]} · size unknown", group.value) for group in TargetGroup]
    return [
        (f"{GROUP_TITLES[group]} · {show.count(number)}", group.value)
        for group, number in counts.items()
    ]


def _unknown() -> str:
    return show.notice(
        "info",
        "Trainable parameters: unknown until the model's config.json is here.",
        "A hub model that no preset names is only known after its download.",
    )


def _total(spec: JobSpec, parameters: int) -> str:
    ranks = max(1, spec.train.num_gpus) * spec.train.num_nodes
    micro_batches = spec.batch.gradient_accumulation_steps * ranks
    if spec.batch.packing:
        tokens = micro_batches * spec.batch.micro_batch_size * spec.data.max_length_tokens
        step = ("tokens a step, at most", show.count(tokens))
    else:
        step = ("examples a step", show.count(micro_batches * spec.batch.micro_batch_size))
    if spec.method == "full":
        return show.facts([("trained", "all weights"), step])
    return show.facts(
        [
            ("trainable parameters", show.count(parameters)),
            step,
            ("adapter, in 32 bits", show.size(4 * parameters)),
        ]
    )


def _yaml_file(text: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix="studio-spec-"))
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)
