"""What can be told of a base model without loading it."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from studio.domain.architecture import Architecture, read_architecture
from studio.domain.lora_spec import LoraSpec
from studio.domain.spec import JobSpec
from studio.domain.target_tree import TargetTree, target_tree
from studio.domain.targets import TargetGroup, count_by_group, selected, target_modules
from studio.errors import InputError
from studio.services.studio import Studio

# Published ones have a few KiB.
MAX_CONFIG_BYTES = 4 * 1024**2
_PUBLISHED = "Use the config.json that was published with the weights."


def config_of(studio: Studio, model_id: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return the configuration of a base model.

    Args:
        studio: The installation.
        model_id: What a ModelRef says.
        revision: Of a hub model.

    Returns:
        The config.json; None for a hub model that neither the studio nor this machine's hub cache
        has seen yet.

    Raises:
        InputError: A tiny model of that name or a folder at that path does not exist, or its
            config.json cannot be read.
    """
    for known in studio.models.values():
        if model_id == known.id or model_id in known.variants:
            return known.config
    if model_id.startswith("tiny/"):
        there = ", ".join(name for name in studio.models if name.startswith("tiny/"))
        raise InputError(
            f"There is no tiny model {model_id!r}.", f"Choose one of: {there}.", field="model.id"
        )
    if model_id.startswith(("/", "~", ".")):
        folder = Path(model_id).expanduser()
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} is no model folder: config.json cannot be read.",
                "Give a folder in Hugging Face's layout, or a hub id.",
                field="model.id",
            )
        return _read_config(folder / "config.json")
    try:
        cached = try_to_load_from_cache(model_id, "config.json", revision=revision)
    except HFValidationError as error:
        raise InputError(
            f"{model_id!r} is no name of a hub model.",
            "Write it as ORGANISATION/NAME, or give the path of a folder.",
            field="model.id",
        ) from error
    return _read_config(Path(cached)) if isinstance(cached, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(
                f"{path} is larger than any model's config.json.", _PUBLISHED, field="model.id"
            )
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", _PUBLISHED, field="model.id"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}.",
            _PUBLISHED,
            field="model.id",
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON.", _PUBLISHED, field="model.id") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no fields with values.", _PUBLISHED, field="model.id")
    return values


def architecture_of(
    studio: Studio, model_id: str, revision: str | None = None
) -> Architecture | None:
    """Return what a model is made of; None when its configuration is not known.

    Raises:
        InputError: The model cannot be trained, or its configuration cannot be right.
    """
    config = config_of(studio, model_id, revision)
    return None if config is None else read_architecture(config)


def tree_of(
    studio: Studio, model_id: str, lora: LoraSpec, revision: str | None = None
) -> TargetTree | None:
    """Return a model's target tree with a choice marked in it; None when it is not known.

    Raises:
        InputError: The model cannot be trained, or the choice does not fit it.
    """
    config = config_of(studio, model_id, revision)
    return None if config is None else target_tree(config, lora)


def parameters_by_group(studio: Studio, spec: JobSpec) -> dict[TargetGroup, int] | None:
    """Return what a LoRA on each target group of a model would train; None when unknown.

    Raises:
        InputError: The model cannot be trained, or its configuration cannot be right.
    """
    config = config_of(studio, spec.model.id, spec.model.revision)
    return None if config is None else count_by_group(target_modules(config), spec.lora)


def check_targets(studio: Studio, spec: JobSpec) -> None:
    """Refuse what does not fit the model, as far as its configuration is known.

    Raises:
        InputError: The preset waits for a part of the studio, the model is none that can be
            trained, it is over several machines, a target matches nothing, the choice of LoRA does
            not go together, the examples are longer than the model reads, or early stopping has
            nothing to go by.
    """
    preset = studio.presets.get(spec.preset)
    if preset is not None and preset.not_yet:
        raise InputError(
            f"The preset {preset.name} cannot be launched yet: {preset.not_yet}.",
            f"Take the preset {preset.instead}, which trains the same model.",
            field="preset",
        )
    if spec.train.num_nodes > 1:
        raise InputError(
            f"A run over {spec.train.num_nodes} machines cannot be launched from here.",
            "Start it by hand with torchrun on each machine (see Training in the README), or set "
            "the machines to 1.",
            field="train.num_nodes",
        )
    if spec.eval.patience is not None and not (spec.data.eval_share or spec.data.eval_dataset):
        raise InputError(
            f"Early stopping after {spec.eval.patience} evaluations needs examples to evaluate.",
            "Set the evaluation share or choose an evaluation dataset, or empty early stopping.",
            field="eval.patience",
        )
    config = config_of(studio, spec.model.id, spec.model.revision)
    if config is None:
        return
    architecture = read_architecture(config)
    if spec.method != "full":
        selected(config, spec.lora)
    longest = spec.data.max_length_tokens
    if longest > architecture.max_positions:
        raise InputError(
            f"Examples of {longest:,} tokens are longer than the {architecture.max_positions:,} "
            "that the model reads.",
            f"Set the longest example to at most {architecture.max_positions:,}.",
            field="data.max_length_tokens",
        )
