"""Tiny models of every family in float32, with a long memory, and documents for them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from studio.tokens.examples import Example

VOCABULARY = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
_DELTA_NET: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": _DELTA_NET | _EXPERTS | _SHARED,
    "qwen3_5_text": _DELTA_NET | {"intermediate_size": 64},
    "qwen3_5_moe_text": _DELTA_NET | _EXPERTS | _SHARED,
    "qwen3": {"num_hidden_layers": 2, "intermediate_size": 64},
    "qwen3_moe": {"num_hidden_layers": 2, "intermediate_size": 64} | _EXPERTS,
}
FAMILIES = tuple(CONFIGS)
DELTA_NET_FAMILIES = tuple(name for name in FAMILIES if "layer_types" in CONFIGS[name])


def tiny(family: str) -> PreTrainedModel:
    """Return a model whose state outlives its documents: one that forgets would hide a leak."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **_COMMON, **CONFIGS[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".A_log"):
                parameter.zero_()
            elif name.endswith(".dt_bias"):
                parameter.fill_(math.log(math.expm1(0.01)))
    return model


def with_lora(model: PreTrainedModel) -> PeftModel:
    """Wrap attention and delta net; both factors are random, so that both have gradients."""
    names = ["q_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_z", "out_proj"]
    found = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=[name for name in names if name in found])
    )
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def documents(lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """Return examples of random tokens, of which about half are supervised."""
    source = np.random.default_rng(seed)
    return [
        Example(
            line=number,
            tokens=source.integers(1, VOCABULARY, length).astype(np.uint32),
            mask=source.random(length) < 0.5,
            turns=np.zeros(1, dtype=np.uint32),
        )
        for number, length in enumerate(lengths)
    ]
