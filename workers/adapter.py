"""Read a saved Adapter in PEFT's layout, and find the tensors of a base that it changes.

What cannot be placed is refused and named: a Merge never drops a part of an Adapter silently.
Not covered, hence refused: DoRA, LoRA on routed experts (target_parameters), on embeddings, on
biases, modules_to_save, and starts that change the base itself (PiSSA, OLoRA, CorDA, LoftQ).
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from studio.errors import EngineError
from workers.shards import Shards, open_shard

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# Fields of PEFT's LoraConfig that leave the meaning of the saved A and B as it is. Any other field
# that is set is refused, so that a future variant of LoRA cannot be merged wrongly in silence.
_NEUTRAL_FIELDS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r target_modules exclude_modules lora_alpha lora_dropout use_rslora layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern megatron_core qalora_group_size runtime_config "
    "init_lora_weights loftq_config eva_config corda_config lora_ga_config ensure_weight_tying"
    "".split()
)
# Starts that leave the base as it is; peft/tuners/lora/layer.py, update_layer.
_NEUTRAL_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_SIXTEEN_OR_MORE_BITS = ("BF16", "F16", "F32")


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """The change of one linear layer: scale * B @ A (LoRA, arXiv 2106.09685, section 4.1).

    Attributes:
        a: (rank, in), float32.
        b: (out, rank), float32.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the changed (out, in) weight: summed in float32, rounded once to its dtype."""
        change = self.scale * (self.b @ self.a)
        return (weight.to(torch.float32) + change).to(weight.dtype)


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """Read an Adapter.

    Args:
        folder: Folder with adapter_config.json and adapter_model.safetensors.

    Returns:
        The change of each layer, by its module path, as in `model.layers.3.self_attn.q_proj`.

    Raises:
        EngineError: It cannot be read, or holds something that cannot be merged; names it.
    """
    config = _read_config(folder)
    with open_shard(folder / WEIGHTS) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    halves: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
        else:
            halves.setdefault(match["module"], {})[match["part"]] = tensor.to(torch.float32)
    unknown += [module for module, pair in halves.items() if not _is_pair(pair, config, module)]
    _refuse(folder, tensors=unknown, fields=_foreign_fields(config))
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise EngineError(
            f"The Adapter in {folder} holds values that are not finite: {_some(broken)}.",
            "The training diverged; choose an earlier checkpoint, or lower the learning rate.",
        )
    if not halves:
        raise EngineError(
            f"The Adapter in {folder} holds no LoRA tensors.",
            "Choose the Adapter of a run that finished at least one step.",
        )
    return {
        module: LowRank(a=pair["A"], b=pair["B"], scale=_scale(config, module))
        for module, pair in halves.items()
    }


def place(adapter: dict[str, LowRank], base: Shards) -> dict[str, str]:
    """Find the tensor of the base that each layer of the Adapter changes.

    The text class that is trained calls a layer `model.layers.N...`; a published checkpoint of a
    model with a vision tower calls the same weight `model.language_model.layers.N...`.

    Returns:
        The name of the tensor in the base's shards, by the module path of the layer.

    Raises:
        EngineError: A layer matches no tensor or more than one, its shape differs, or it is
            stored in 8 bits or less; all such layers are named.
    """
    placed: dict[str, str] = {}
    wrong = []
    for module, low_rank in adapter.items():
        keys = [key for key in _possible_keys(module) if key in base.file_of]
        if len(keys) != 1 or keys[0] in placed.values() or not _fits(low_rank, base, keys[0]):
            wrong.append(module)
        else:
            placed[module] = keys[0]
    _refuse(base.folder, tensors=wrong, fields=[])
    return placed


def _possible_keys(module: str) -> list[str]:
    text = module.removeprefix("model.").removeprefix("language_model.")
    return [f"{module}.weight"] + [
        name
        for name in (f"model.{text}.weight", f"model.language_model.{text}.weight")
        if name != f"{module}.weight"
    ]


def _fits(low_rank: LowRank, base: Shards, key: str) -> bool:
    shape, dtype = base.describe(key)
    wanted = (low_rank.b.shape[0], low_rank.a.shape[1])
    return shape == wanted and dtype in _SIXTEEN_OR_MORE_BITS


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


def _foreign_fields(config: dict[str, Any]) -> list[str]:
    fields = [
        name
        for name, value in config.items()
        if name not in _NEUTRAL_FIELDS and value and (name, value) != ("bias", "none")
    ]
    start = config.get("init_lora_weights", True)
    return [*fields, f"init_lora_weights={start}"] if start not in _NEUTRAL_STARTS else fields


def _is_pair(pair: dict[str, torch.Tensor], config: dict[str, Any], module: str) -> bool:
    if set(pair) != {"A", "B"} or pair["A"].dim() != 2 or pair["B"].dim() != 2:
        return False
    return pair["A"].shape[0] == pair["B"].shape[1] == _rank(config, module)


def _rank(config: dict[str, Any], module: str) -> int:
    pattern = config.get("rank_pattern") or {}
    return int(pattern.get(get_pattern_key(list(pattern), module), config["r"]))


def _scale(config: dict[str, Any], module: str) -> float:
    """Return alpha / r, or alpha / sqrt(r) of rsLoRA (arXiv 2312.03732, theorem 3.2)."""
    pattern = config.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), module), config["lora_alpha"]))
    rank = _rank(config, module)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _refuse(folder: Path, *, tensors: list[str], fields: list[str]) -> None:
    found = []
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
