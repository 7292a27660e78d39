"""Small random models of every family, without tokenizer and templates: built in milliseconds."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SHARED: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
_DENSE: dict[str, Any] = {"intermediate_size": 384}
_SHARED_EXPERT: dict[str, Any] = {"shared_expert_intermediate_size": 192}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _SHARED | _DELTA_NET | _DENSE,
    "qwen3_5_moe_text": _SHARED | _DELTA_NET | _EXPERTS | _SHARED_EXPERT,
    "qwen3_next": _SHARED | _DELTA_NET | _EXPERTS | _SHARED_EXPERT,
    "qwen3": _SHARED | _DENSE,
    "qwen3_moe": _SHARED | _EXPERTS,
}


def config_of(family: str) -> dict[str, Any]:
    """Return a small config.json."""
    return {"model_type": family, **CONFIGS[family]}


def small_model(family: str) -> PreTrainedModel:
    """Build a small model with the same random weights each time, frozen, in float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CONFIGS[family])
    options = {"experts_implementation": "studio"} if "num_experts" in CONFIGS[family] else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32, **options
    )
    model.requires_grad_(False)
    return model
