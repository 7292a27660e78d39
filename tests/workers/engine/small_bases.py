"""Bases of every family that take milliseconds, and what a LoRA can train in them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from studio.domain.targets import TargetGroup
from tests.workers.engine.checkpoints import CONFIGS

GROUPS = {
    "qwen3_next": tuple(g for g in TargetGroup if g is not TargetGroup.DENSE_MLP),
    "qwen3_5_moe_text": tuple(g for g in TargetGroup if g is not TargetGroup.DENSE_MLP),
    "qwen3_5_text": (
        TargetGroup.ATTENTION,
        TargetGroup.DELTA_NET,
        TargetGroup.DELTA_NET_GATES,
        TargetGroup.DENSE_MLP,
        TargetGroup.EMBEDDINGS,
        TargetGroup.HEAD,
    ),
    "qwen3_moe": (
        TargetGroup.ATTENTION,
        TargetGroup.ROUTED_EXPERTS,
        TargetGroup.ROUTER,
        TargetGroup.EMBEDDINGS,
        TargetGroup.HEAD,
    ),
    "qwen3": (
        TargetGroup.ATTENTION,
        TargetGroup.DENSE_MLP,
        TargetGroup.EMBEDDINGS,
        TargetGroup.HEAD,
    ),
}
TOKENS = torch.arange(3, 40)[None]


def save_base(family: str, folder: Path, **changes: Any) -> Path:
    """Save two layers with random float32 weights: 8 experts of 64 inner features, 2 a token."""
    settings = {**CONFIGS[family], "num_hidden_layers": 2, **changes}
    if "layer_types" in settings:
        settings["layer_types"] = ["linear_attention", "full_attention"]
    torch.manual_seed(7)
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        AutoConfig.for_model(family, **settings)
    )
    model.save_pretrained(folder)
    return folder


def fill(model: nn.Module) -> None:
    """Give every factor of a LoRA random values, none of them symmetrical."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.1)


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Return (1, T, V), without a gradient."""
    with torch.no_grad():
        out: torch.Tensor = model(tokens, use_cache=False).logits
    return out
