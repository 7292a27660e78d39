"""What a spec means, beside the form: target choices, figures, tree, memory, YAML."""

import functools
import hashlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from studio.domain.lora_spec import LoraSpec
from studio.domain.preset import find_preset
from studio.domain.spec import JobSpec, parse_spec, spec_to_yaml
from studio.domain.targets import GROUP_TITLES, TargetGroup
from studio.errors import StudioError
from studio.services import budgets, mixtures, models
from studio.services.studio import Studio
from studio.ui import form, show, show_budget, show_targets

TARGETS = "lora.targets"
STALE = "The figures are those of the last form that was right."
# A downloaded spec is read at once; more than one is kept for those who download at that moment.
MAX_YAML_FILES = 8
_writing = threading.Lock()


def fill(studio: Studio, leaves: Sequence[form.Leaf], spec: JobSpec) -> list[Any]:
    """Return what fields and derived components show for a spec."""
    values = form.to_values(spec, leaves)
    return [*values, *derive(studio, leaves, values)]


def derive(studio: Studio, leaves: Sequence[form.Leaf], values: Sequence[Any]) -> list[Any]:
    """Return what the values of the form mean, in the order of TrainTab.derived.

    That is: target choices, card, total, trouble, YAML, download, epoch, tree, budget, and the
    trouble again for the place above the fields. What cannot be told of a wrong form stays.
    """
    named = dict(zip((leaf.key for leaf in leaves), values, strict=True))
    card = show.preset(find_preset(studio.presets, named["preset"])) if named["preset"] else ""
    counts = _counts(studio, leaves, named)
    lost = _without_lost(named, counts)
    choices = _target_group(named, counts)
    # What was counted before is of another spec.
    counted = ""
    try:
        spec = form.to_spec(list(named.values()), leaves)
    except StudioError as error:
        trouble = _trouble(error, STALE)
        stays = gr.skip()
        return [choices, card, stays, trouble, stays, stays, counted, stays, stays, trouble]
    figures, wrong = _figures(studio, spec)
    trouble = _lost_words(spec, lost)
    if wrong is not None:
        trouble = _trouble(wrong, "" if figures else STALE)
    total, tree, memory = figures or [gr.skip()] * 3
    text = spec_to_yaml(spec)
    download = gr.DownloadButton(value=_yaml_file(text))
    return [choices, card, total, trouble, text, download, counted, tree, memory, trouble]


def _trouble(error: StudioError, further: str) -> str:
    return show.notice("bad", error.message, f"{error.hint} {further}".strip())


def _counts(
    studio: Studio, leaves: Sequence[form.Leaf], named: Mapping[str, Any]
) -> dict[TargetGroup, int] | None:
    """Return what each group of the named model trains, whatever else is wrong in the form."""
    try:
        try:
            spec = form.to_spec(list(named.values()), leaves)
        except StudioError:
            model = {"id": named["model.id"] or "", "revision": named["model.revision"] or None}
            spec = parse_spec({"model": model})
        return models.parameters_by_group(studio, spec)
    except StudioError:
        return None


def _without_lost(named: dict[str, Any], counts: dict[TargetGroup, int] | None) -> list[str]:
    """Take away the ticks of groups that the model does not have, and return them."""
    ticks = list(named[TARGETS] or [])
    offered = [group.value for group in (TargetGroup if counts is None else counts)]
    named[TARGETS] = [tick for tick in ticks if tick in offered]
    return [tick for tick in ticks if tick not in offered]


def _lost_words(spec: JobSpec, lost: Sequence[str]) -> str:
    if not lost or spec.method == "full":
        return ""
    titles = {group.value: title for group, title in GROUP_TITLES.items()}
    return show.notice(
        "info",
        f"{spec.model.id} has no {', '.join(titles.get(tick, tick) for tick in lost)}.",
        "What it does not have is no longer ticked.",
    )


def _target_group(
    named: Mapping[str, Any], counts: dict[TargetGroup, int] | None
) -> gr.CheckboxGroup:
    """Return the choices of targets; where all weights train, one sentence in their place."""
    is_all = named["method"] == "full"
    described = LoraSpec.model_fields["targets"].description
    return gr.CheckboxGroup(
        choices=_target_choices(counts),
        value=named[TARGETS],
        info="All weights of the text model train: method is full." if is_all else described,
        interactive=not is_all,
        elem_classes=["all-weights"] if is_all else [],
    )


def _figures(studio: Studio, spec: JobSpec) -> tuple[list[str], StudioError | None]:
    """Return total, tree and memory, none when they cannot be told; and what is wrong."""
    wrong: StudioError | None = None
    try:
        models.check_targets(studio, spec)
        if spec.data.dataset:
            mixtures.for_training(studio, spec)
    except StudioError as error:
        wrong = error
    try:
        tree = models.tree_of(studio, spec.model.id, spec.lora, spec.model.revision)
        estimate = budgets.budget_of(studio, spec)
    except StudioError as error:
        return [], wrong or error
    total = _unknown() if tree is None else _total(spec, tree.selected_parameters)
    shown_tree = "" if tree is None else show_targets.targets(tree)
    if spec.method == "full":
        shown_tree = "All weights of the text model train."
    return [total, shown_tree, _no_gpu(spec) + show_budget.estimate(estimate)], wrong


def _no_gpu(spec: JobSpec) -> str:
    if not spec.train.num_gpus or budgets.cards_here():
        return ""
    wanted = "a GPU" if spec.train.num_gpus == 1 else f"{spec.train.num_gpus} GPUs"
    return show.notice(
        "info",
        f"This run asks for {wanted}, and this machine shows none.",
        "It waits in the queue until a worker has them; a tiny preset trains on the CPU.",
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


@functools.cache
def _yaml_folder() -> tempfile.TemporaryDirectory[str]:
    """Return the folder of this process for specs to download; it goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="studio-spec-")


def _yaml_file(text: str) -> str:
    """Return the path of a file with that text; the same text has the same file."""
    content = text.encode()
    with _writing:
        folder = Path(_yaml_folder().name)
        path = folder / f"spec-{hashlib.sha256(content).hexdigest()[:12]}.yaml"
        if path.exists():
            path.touch()
        else:
            path.write_bytes(content)
        newest = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        for file in newest[MAX_YAML_FILES:]:
            if file != path:
                file.unlink()
    return str(path)
