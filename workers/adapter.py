"""Read a saved Adapter in PEFT's layout: LoRA and DoRA on layers, experts, routers, embeddings.

What is not understood is refused and named: a Merge never drops a part of an Adapter silently.
Not covered, hence refused: LoRA on biases, modules_to_save, DoRA on anything but linear layers,
and starts that change the base itself (PiSSA, OLoRA, CorDA, LoftQ).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from studio.errors import EngineError
from workers.low_rank import Change, ExpertsLowRank, LowRank
from workers.shards import open_shard

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_PREFIX = r"base_model\.model\."
_KEY = re.compile(
    _PREFIX + r"(?P<module>.+?)(?P<wrappers>(\.base_layer)*)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)"
)
_COPY = re.compile(_PREFIX + r"(?P<module>.+)\.base_layer\.weight")
_BASE_LAYER = ".base_layer"
_LINEAR = {"lora_A.weight", "lora_B.weight"}
_EMBEDDING = {"lora_embedding_A", "lora_embedding_B"}
_MAGNITUDE = "lora_magnitude_vector"
# Order in which the experts of all families declare their parameters. PEFT wraps them in that
# order, the first innermost, whatever the order of target_parameters
# (peft/tuners/tuners_utils.py, _inject_parameters).
_DECLARED = ("gate_up_proj", "down_proj")
# Fields of PEFT's LoraConfig that are read here or leave the meaning of the saved tensors as it
# is. Any other field that is set is refused, so that a future variant of LoRA cannot be merged
# wrongly in silence.
_KNOWN_FIELDS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r target_modules target_parameters exclude_modules lora_alpha lora_dropout use_rslora "
    "use_dora layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core "
    "qalora_group_size runtime_config init_lora_weights loftq_config eva_config corda_config "
    "lora_ga_config ensure_weight_tying".split()
)
# Starts that leave the base as it is; peft/tuners/lora/layer.py, update_layer.
_NEUTRAL_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What an Adapter holds, by the names of parameters in the text model.

    Attributes:
        changes: As in `model.layers.3.self_attn.q_proj.weight`, or
            `model.layers.3.mlp.experts.gate_up_proj` for the experts of one layer.
        copies: Weights of the base that PEFT saves beside a LoRA on embeddings or head.
    """

    changes: dict[str, Change]
    copies: dict[str, torch.Tensor]


def read_adapter(folder: Path) -> Adapter:
    """Read an Adapter; its tensors stay on the disk until they are used.

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        EngineError: It cannot be read, or holds something that cannot be merged; names it.
    """
    config = _read_config(folder)
    with open_shard(folder / WEIGHTS) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    layers, copies, unknown = _sorted_out(tensors)
    changes: dict[str, Change] = {}
    for module, levels in layers.items():
        paths = _paths(config, module, levels)
        for depth, parts in levels.items():
            change = _change(config, module, paths[depth], parts) if depth in paths else None
            if change is None:
                unknown += [f"{module}{depth * _BASE_LAYER}.{part}" for part in parts]
            else:
                changes[paths[depth]] = change
    refuse(folder, tensors=unknown, fields=_foreign_fields(config))
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise EngineError(
            f"The Adapter in {folder} holds values that are not finite: {_some(broken)}.",
            "The training diverged; choose an earlier checkpoint, or lower the learning rate.",
        )
    if not changes:
        raise EngineError(
            f"The Adapter in {folder} holds no LoRA tensors.",
            "Choose the Adapter of a run that finished at least one step.",
        )
    return Adapter(changes=changes, copies=copies)


# The parts of each LoRA, by module and by how many `.base_layer` it is nested in.
_Layers = dict[str, dict[int, dict[str, torch.Tensor]]]


def _sorted_out(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[_Layers, dict[str, torch.Tensor], list[str]]:
    layers: _Layers = {}
    copies: dict[str, torch.Tensor] = {}
    unknown = []
    for key, tensor in tensors.items():
        if copied := _COPY.fullmatch(key):
            copies[f"{copied['module']}.weight"] = tensor
        elif match := _KEY.fullmatch(key):
            depth = len(match["wrappers"]) // len(_BASE_LAYER)
            parts = layers.setdefault(match["module"], {}).setdefault(depth, {})
            parts[match["part"]] = tensor
        else:
            unknown.append(key)
    return layers, copies, unknown


def _paths(config: Mapping[str, Any], module: str, levels: Iterable[int]) -> dict[int, str]:
    """Return the name of the parameter that each LoRA of a module changes, by its depth."""
    names = _wrapped_parameters(config, module) or ("weight",)
    depths = range(len(names))
    # The first parameter is wrapped first, so it lies deepest.
    paths = {depth: f"{module}.{names[-1 - depth]}" for depth in depths}
    return paths if set(levels) == set(depths) else {}


def _wrapped_parameters(config: Mapping[str, Any], module: str) -> tuple[str, ...]:
    """Return the parameters of a module that PEFT's target_parameters name, in its own order."""
    targets = config.get("target_parameters") or ()
    names = {str(target).rpartition(".")[2] for target in targets}
    wrapped = {
        name
        for name in names
        if any(f".{module}.{name}".endswith(f".{target}") for target in targets)
    }
    if len(wrapped) > 1:
        return _DECLARED if wrapped == set(_DECLARED) else ()
    return tuple(wrapped)


def _change(
    config: Mapping[str, Any], module: str, path: str, parts: Mapping[str, torch.Tensor]
) -> Change | None:
    """Return what one LoRA means; None where its tensors do not make one."""
    is_parameter = bool(_wrapped_parameters(config, module))
    rank, scale = _rank_and_scale(config, path if is_parameter else module)
    kinds = set(parts)
    if any(tensor.dim() != (1 if part == _MAGNITUDE else 2) for part, tensor in parts.items()):
        return None
    if kinds == _EMBEDDING and not is_parameter and not config.get("use_dora"):
        a, b = parts["lora_embedding_B"].T, parts["lora_embedding_A"].T
        return LowRank(a=a, b=b, scale=scale) if a.shape[0] == b.shape[1] == rank else None
    if kinds != (_LINEAR | {_MAGNITUDE} if config.get("use_dora") else _LINEAR):
        return None
    a, b, magnitude = parts["lora_A.weight"], parts["lora_B.weight"], parts.get(_MAGNITUDE)
    if is_parameter and not path.endswith(".weight"):
        fits = a.shape[0] == b.shape[1] and a.shape[0] % rank == 0 and magnitude is None
        return ExpertsLowRank(a=a, b=b, rank=rank, scale=scale) if fits else None
    fits = a.shape[0] == b.shape[1] == rank
    if magnitude is not None:
        fits = fits and not is_parameter and magnitude.shape == b.shape[:1]
    return LowRank(a=a, b=b, scale=scale, magnitude=magnitude) if fits else None


def _rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Return the rank and alpha / r, or alpha / sqrt(r) of rsLoRA (arXiv 2312.03732, theorem 3.2).

    Args:
        config: Settings of the Adapter.
        name: What PEFT matches its patterns with: the module, or the targeted parameter.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = int(ranks.get(get_pattern_key(list(ranks), name), config["r"]))
    alpha = float(alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(
            f"The Adapter in {folder} has no readable {CONFIG}.",
            "Choose the Adapter of a run that saved one.",
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise EngineError(f"The Adapter in {folder} is no LoRA.", "Choose a LoRA Adapter.")
    return config


def _foreign_fields(config: Mapping[str, Any]) -> list[str]:
    fields = [
        name
        for name, value in config.items()
        if name not in _KNOWN_FIELDS and value and (name, value) != ("bias", "none")
    ]
    start = config.get("init_lora_weights", True)
    return [*fields, f"init_lora_weights={start}"] if start not in _NEUTRAL_STARTS else fields


def refuse(folder: Path, *, tensors: Iterable[str], fields: Iterable[str] = ()) -> None:
    """Refuse an Adapter of which something has no place.

    Args:
        folder: What it does not fit.
        tensors: What has no place; nothing is refused when both are empty.
        fields: Settings that are not known.

    Raises:
        EngineError: Names them.
    """
    tensors, fields, found = list(tensors), list(fields), []
    if fields:
        found.append(f"its settings {_some(fields)} are not merged by the studio")
    if tensors:
        found.append(f"these tensors have no place in the base: {_some(tensors)}")
    if found:
        raise EngineError(
            f"The Adapter does not fit {folder}: {'; '.join(found)}.",
            "Merge it with the program that trained it, or train an Adapter here on this base.",
        )


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
