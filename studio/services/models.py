"""What can be told of a base model without loading it."""

import json
from pathlib import Path
from typing import Any

from studio.domain.spec import JobSpec
from studio.domain.targets import TargetGroup, count_by_group, select, target_modules
from studio.errors import InputError
from studio.services.studio import Studio


def config_of(studio: Studio, model_id: str) -> dict[str, Any] | None:
    """Return the configuration of a base model.

    Args:
        studio: The installation.
        model_id: What a ModelRef says.

    Returns:
        The config.json; None for a hub model that the studio has not seen yet.

    Raises:
        InputError: A tiny model of that name or a folder at that path does not exist.
    """
    known = studio.models.get(model_id)
    if known is not None:
        return known.config
    if model_id.startswith("tiny/"):
        there = ", ".join(name for name in studio.models if name.startswith("tiny/"))
        raise InputError(
            f"There is no tiny model {model_id!r}.", f"Choose one of: {there}.", field="model.id"
        )
    if model_id.startswith(("/", "~", ".")):
        return _read_config(Path(model_id).expanduser())
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{folder} is no model folder: config.json cannot be read.",
            "Give a folder in Hugging Face's layout, or a hub id.",
            field="model.id",
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}.",
            "Use the config.json that was published with the weights.",
            field="model.id",
        ) from error
    return dict(values)


def trainable_parameters(studio: Studio, model_id: str, rank: int) -> dict[TargetGroup, int] | None:
    """Return trainable parameters of each target group that a model has; None when unknown."""
    config = config_of(studio, model_id)
    return None if config is None else count_by_group(target_modules(config), rank)


def check_targets(studio: Studio, spec: JobSpec) -> None:
    """Refuse targets that match nothing, as far as the model's configuration is known.

    Raises:
        InputError: A target group matches nothing, or the model is none that can be trained.
    """
    config = config_of(studio, spec.model.id)
    if config is not None:
        select(target_modules(config), spec.lora.targets)
