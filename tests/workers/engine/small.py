"""Families as small as they go: two layers, one of each kind, 64 wide."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
_EXPERTS = {
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_COMMON, **_EXPERTS},
    "qwen3_5_text": {**_COMMON, "intermediate_size": 128},
    "qwen3_5_moe_text": {**_COMMON, **_EXPERTS},
}


def write_small(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a model of random weights, the same each time, as a Hugging Face folder."""
    config = AutoConfig.for_model(kind, **SIZES[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
    model.to(dtype).save_pretrained(folder)
    return folder
