"""`studio model ...`: list, targets."""

from typing import Annotated, Any

import typer

from studio import terminal
from studio.domain.architecture import read_architecture
from studio.domain.lora_spec import LoraSpec
from studio.domain.preset import KnownModel
from studio.domain.spec import ModelRef, parse_spec
from studio.domain.target_tree import GroupBranch, TargetTree, target_tree
from studio.domain.targets import target_modules
from studio.errors import NotFoundError
from studio.options import HomeOption, JsonOption, studio_of
from studio.services import models
from studio.terminal import out, say_json

model_app = typer.Typer(help="Look at base models without loading them.", no_args_is_help=True)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="org/name@revision of the hub, path of a folder, or tiny/NAME."
    ),
]


@model_app.command("list")
def list_all(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the models whose configuration the studio knows."""
    studio = studio_of(home)
    presets: dict[str, list[str]] = {}
    for preset in studio.presets.values():
        if not preset.not_yet:
            presets.setdefault(preset.job_spec().model.id, []).append(preset.name)
    rows = [_model_values(known, presets) for known in studio.models.values()]
    if as_json:
        say_json(rows)
        return
    terminal.show_table(
        ("model", "layers", "experts", "family"),
        [(r["id"], r["layers"], r["experts"] or "-", r["family"]) for r in rows],
    )


def _model_values(known: KnownModel, presets: dict[str, list[str]]) -> dict[str, Any]:
    found = read_architecture(known.config)
    return {
        "id": known.id,
        "title": known.title,
        "variants": list(known.variants),
        "family": found.title,
        "layers": len(found.layers),
        "experts": 0 if found.experts is None else found.experts.count,
        "max_positions": found.max_positions,
        "has_vision": found.has_vision,
        "mtp_layers": found.mtp_layers,
        "source": known.source,
        "presets": presets.get(known.id, []),
    }


@model_app.command("targets")
def targets(
    model: ModelArgument,
    groups: Annotated[
        str, typer.Option("--targets", help="Target groups, with commas between them.")
    ] = "",
    modules: Annotated[
        str, typer.Option("--modules", help="Names of further layers, with commas between them.")
    ] = "",
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA.", show_default=False)] = None,
    expert_rank: Annotated[
        str, typer.Option(help="same, or divided: the experts of a token share the rank.")
    ] = "same",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a LoRA would train in a model, group by group."""
    ref = _ref(model)
    config = models.config_of(studio_of(home), ref.id, ref.revision)
    if config is None:
        raise NotFoundError(
            f"The configuration of {model} is not known on this machine.",
            "Give the path of a folder with its config.json, or choose one of `studio model list`.",
            field="model.id",
        )
    lora: dict[str, Any] = {"modules": modules, "expert_rank": expert_rank}
    lora["targets"] = _parts(groups) or ([] if modules else _usual(config))
    if rank is not None:
        lora["rank"] = rank
    found = target_tree(config, parse_spec({"lora": lora}).lora)
    if as_json:
        say_json(_tree_values(found))
        return
    out.print(f"{model}: {found.family}, {found.num_layers} layers", markup=False)
    terminal.show_table(
        ("group", "trained", "parameters", "adapter MiB", "if all"),
        [*(_row(branch) for branch in found.groups), _total(found)],
    )
    for branch in found.groups:
        if branch.note:
            out.print(f"{branch.group.value}: {branch.note}", markup=False)
    for part in found.not_trained:
        out.print(f"{part.title}, not trained: {part.reason}", markup=False)


def _ref(model: str) -> ModelRef:
    """Read `org/name@revision`; a path may hold any character."""
    name, _, revision = (model, "", "") if model[:1] in ("/", "~", ".") else model.partition("@")
    return parse_spec({"model": {"id": name, "revision": revision}}).model


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _usual(config: dict[str, Any]) -> list[str]:
    """Return the groups that a LoRA trains by default, as far as the model has them."""
    present = {module.group for module in target_modules(config)}
    return [group.value for group in LoraSpec().targets if group in present]


def _row(branch: GroupBranch) -> tuple[str, ...]:
    trained = f"{branch.selected_modules:,} of {branch.modules:,}"
    return (
        branch.group.value,
        trained,
        f"{branch.selected_parameters:,}",
        _mib(branch.adapter_bytes),
        f"{branch.parameters:,}",
    )


def _total(found: TargetTree) -> tuple[str, ...]:
    parameters = f"{found.selected_parameters:,}"
    return ("all", f"{found.selected_modules:,}", parameters, _mib(found.adapter_bytes), "")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}"


def _tree_values(found: TargetTree) -> dict[str, Any]:
    groups = [
        {**branch.model_dump(mode="json"), "adapter_bytes": branch.adapter_bytes}
        for branch in found.groups
    ]
    return {
        **found.model_dump(mode="json"),
        "groups": groups,
        "selected_modules": found.selected_modules,
        "selected_parameters": found.selected_parameters,
        "adapter_bytes": found.adapter_bytes,
    }
