"""The five models that are measured, by the size in their names, and their tiny stand-ins."""

from collections.abc import Mapping
from typing import Any

from studio.disk import TEMPLATES
from studio.domain.architecture import Architecture, read_architecture
from studio.domain.preset import Preset, find_preset, load_models, load_presets

PRESETS = {
    "80b": "qwen3-next-80b-a3b-qlora",
    "122b": "qwen3.5-122b-a10b-qlora",
    "35b": "qwen3.5-35b-a3b-qlora",
    "27b": "qwen3.5-27b-qlora",
    "9b": "qwen3.5-9b-lora",
}
TINY = {
    "80b": "tiny-qwen3-next",
    "122b": "tiny-qwen3.5-moe",
    "35b": "tiny-qwen3.5-moe",
    "27b": "tiny-qwen3.5",
    "9b": "tiny-qwen3.5",
}


def preset_of(name: str, *, is_tiny: bool = False) -> Preset:
    """Return the Preset of a size, as in `80b`."""
    return find_preset(load_presets(TEMPLATES / "presets"), (TINY if is_tiny else PRESETS)[name])


def config_of(name: str, *, is_tiny: bool = False, depth: int | None = None) -> dict[str, Any]:
    """Return the text part of a model's config.json.

    Args:
        name: The size, as in `80b`.
        is_tiny: Of its tiny stand-in.
        depth: Keep only so many layers; None keeps all.
    """
    models = load_models(TEMPLATES / "models")
    config = models[preset_of(name, is_tiny=is_tiny).job_spec().model.id].config
    text: Mapping[str, Any] = config.get("text_config", config)
    values = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **text}
    if depth is not None:
        values["num_hidden_layers"] = depth
        if "layer_types" in values:
            values["layer_types"] = values["layer_types"][:depth]
    return values


def architecture_of(name: str, *, is_tiny: bool = False) -> Architecture:
    """Return what a model is made of."""
    return read_architecture(config_of(name, is_tiny=is_tiny))
