"""Small checkpoints in the layouts of the published ones, with all that is published beside them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = 3
_SHARED: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_SHARED, **_DELTA, **_EXPERTS, **_SHARED_EXPERT},
    "qwen3_5_moe_text": {**_SHARED, **_DELTA, **_EXPERTS, **_SHARED_EXPERT},
    "qwen3_5_text": {**_SHARED, **_DELTA, "intermediate_size": 128},
    "qwen3_moe": {**_SHARED, **_EXPERTS, "intermediate_size": 128},
    "qwen3": {**_SHARED, "intermediate_size": 128},
}
WITH_EXPERTS = ("qwen3_next", "qwen3_5_moe_text", "qwen3_moe")


def write_checkpoint(
    family: str, folder: Path, tokenizer_of: Path, *, fused: bool = False, **config: Any
) -> Path:
    """Write random bf16 weights as published: several shards, MTP, a vision tower for Qwen3.5.

    Args:
        family: model_type of the text part.
        folder: Where to.
        tokenizer_of: A model folder whose tokenizer is copied.
        fused: Whether experts are stored as one tensor, as Qwen3.5 does.
        config: Changes to the text config.
    """
    values = {**CONFIGS[family], **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.for_model(family, **values), dtype=torch.bfloat16
        )
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if fused:
            tensors = {k: v for k, v in tensors.items() if ".experts." not in k}
            tensors |= {k: v for k, v in model.state_dict().items() if ".experts." in k}
        tensors |= _beside(family, model)
    if family.startswith("qwen3_5"):
        tensors = {_inside(name): tensor for name, tensor in tensors.items()}
        text = json.loads((folder / "config.json").read_text())
        whole = family.removesuffix("_text")
        config_json = {"model_type": whole, "text_config": text, "vision_config": {"depth": 1}}
        (folder / "config.json").write_text(json.dumps(config_json))
    _write_shards(tensors, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer_of / name, folder / name)
    return folder


def _beside(family: str, model: Any) -> dict[str, torch.Tensor]:
    """Return what is published and not loaded: the next-token head and the vision tower."""
    extra = {"mtp.fc.weight": torch.zeros(64, 128, dtype=torch.bfloat16)}
    for name, tensor in model.state_dict().items():
        if name.startswith(f"model.layers.{LAYERS - 1}.mlp."):
            extra[name.replace(f"model.layers.{LAYERS - 1}", "mtp.layers.0")] = tensor.clone()
    if family == "qwen3_next":
        for part, shape in (("gate_proj", (64, 64)), ("down_proj", (64, 64))):
            for expert in range(8):
                name = f"mtp.layers.0.mlp.experts.{expert}.{part}.weight"
                extra[name] = torch.zeros(shape, dtype=torch.bfloat16)
    if family.startswith("qwen3_5"):
        extra["model.visual.blocks.0.attn.qkv.weight"] = torch.zeros(8, 8, dtype=torch.bfloat16)
    return extra if family not in ("qwen3", "qwen3_moe") else {}


def _inside(name: str) -> str:
    if name.startswith("model.") and not name.startswith("model.visual"):
        return name.replace("model.", "model.language_model.", 1)
    return name


def _write_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    # Cut anywhere: the tensors of a layer lie in two shards, as in large published models.
    names = sorted(tensors)
    size = -(-len(names) // 4)
    weight_map = {}
    for number in range(4):
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number * size :][:size]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
