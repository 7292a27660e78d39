"""Models of every family that are smaller than the tiny ones, and real PEFT Adapters on them."""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from workers.shards import INDEX, SINGLE

HIDDEN, INNER, EXPERTS, RANK = 64, 32, 5, 3
EXPERT_TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "moe_intermediate_size": INNER,
    "shared_expert_intermediate_size": 96,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
_MIXED = ["linear_attention", "full_attention"]


def save_model(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, vocab_size: int = 96
) -> Path:
    """Save a model with random weights as transformers does: each expert by itself."""
    shape: dict[str, Any] = {**_SHAPE, "vocab_size": vocab_size}
    if family not in ("qwen3", "qwen3_moe"):
        shape["layer_types"] = _MIXED
    config = AutoConfig.for_model(family, **shape)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    model.to(dtype).save_pretrained(folder)
    return folder


def fuse_experts(folder: Path) -> Path:
    """Lay the experts out as Qwen3.5 publishes them: two stacks for each layer."""
    tensors = load_file(folder / SINGLE)
    for name in [key for key in tensors if ".experts.0.gate_proj" in key]:
        prefix = name.split("0.gate_proj")[0]
        own = [
            {kind: tensors.pop(f"{prefix}{e}.{kind}.weight") for kind in _KINDS}
            for e in range(EXPERTS)
        ]
        tensors[f"{prefix}gate_up_proj"] = torch.stack(
            [torch.cat([one["gate_proj"], one["up_proj"]]) for one in own]
        )
        tensors[f"{prefix}down_proj"] = torch.stack([one["down_proj"] for one in own])
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


_KINDS = ("gate_proj", "up_proj", "down_proj")


def publish(source: Path, target: Path, *, num_shards: int = 4, in_tower: bool = True) -> Path:
    """Lay a model out as the hub does: several shards, vision tower, multi-token prediction."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {
        key.replace("model.", "model.language_model.", 1)
        if in_tower and key.startswith("model.")
        else key: value
        for key, value in load_file(source / SINGLE).items()
    }
    tensors["mtp.layers.0.mlp.experts.0.down_proj.weight"] = torch.randn(64, 32).bfloat16()
    if in_tower:
        tensors["model.visual.pos_embed.weight"] = torch.full((8, 8), float("nan"))
    names = sorted(tensors)
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number::num_shards]
        save_file({key: tensors[key] for key in part}, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return target


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrapped:
    """A model that stock PEFT has wrapped, and the folder that it was saved to."""

    tuner: LoraModel
    folder: Path

    def merged(self) -> Mapping[str, torch.Tensor]:
        """Return what PEFT's own merge makes of the model, by the names of the text class."""
        return self.tuner.merge_and_unload().state_dict()


def save_adapter(base: Path, folder: Path, **settings: Any) -> Wrapped:
    """Wrap a model with stock PEFT, fill its LoRA with random values, save it as PEFT does.

    The model hangs under a plain module, so that PEFT does not take a shared expert for the routed
    ones (https://github.com/huggingface/peft/issues/3711).
    """
    text = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = nn.Module()
    for name, child in text.named_children():
        model.add_module(name, child)
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": RANK, "lora_alpha": 7, **settings})
    with warnings.catch_warnings():
        # A false alarm of PEFT: see workers/meaning.py.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys")
        tuner = LoraModel(model, config, "default")
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuner.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
            elif ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    folder.mkdir(parents=True)
    tensors = get_peft_model_state_dict(tuner, save_embedding_layers=False)
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.{key}": value.contiguous() for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return Wrapped(tuner=tuner, folder=folder)
