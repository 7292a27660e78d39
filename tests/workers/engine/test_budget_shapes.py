"""What a layer keeps, predicted and as autograd saves it, at the published shapes in bfloat16.

On the meta device: shapes without numbers, so the largest model takes a second. Three kernels that
run on GPUs only are stood in for: flash-linear-attention 0.6 keeps of its delta rule q and k after
their norms (with its factors), v, the summed decays, beta and a triangular matrix of each chunk
(ops/gated_delta_rule/chunk.py), of its convolution the input; FlashAttention is torch's own.
Not covered: dropout, whose mask is wider on the meta device than on a GPU; 4-bit weights, which
change nothing in what a linear layer keeps.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

import workers.engine.experts  # noqa: F401  # registers the experts function
from studio.disk import TEMPLATES
from studio.domain.architecture import read_architecture, text_config
from studio.domain.lora_spec import LoraSpec
from studio.domain.memory_activations import DELTA_CHUNK, Pass, kept_bytes
from studio.domain.preset import load_models
from studio.domain.targets import TargetGroup, selected, target_modules
from workers.engine.lora import add_adapter
from workers.engine.recompute import decoder_layers

TOKENS, NUM_LAYERS = 512, 4
MODELS = {
    model.id: text_config(model.config) | {"num_hidden_layers": NUM_LAYERS, "layer_types": None}
    for model in load_models(TEMPLATES / "models").values()
    if not model.is_built_here and not model.id.endswith("-2507")  # shaped like its older form
}
Tensors = tuple[torch.Tensor, ...]


class _KeepsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)


class _KeepsAsFla(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        q, k, v, g, beta = (each.contiguous() for each in inputs)
        factors = (q.new_empty(each.shape[:-1], dtype=torch.float32) for each in (q, k))
        triangles = beta.new_empty(*beta.shape, DELTA_CHUNK)
        decays = torch.empty_like(g, dtype=torch.float32)
        normed = (torch.empty_like(q), torch.empty_like(k))
        ctx.save_for_backward(*normed, *factors, v, decays, beta, triangles)
        return torch.empty_like(v)


def _convolve(x: torch.Tensor, *_args: Any, **_options: Any) -> torch.Tensor:
    return _KeepsInput.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def _delta_rule(q: Any, k: Any, v: Any, g: Any, beta: Any, **_options: Any) -> tuple[Any, None]:
    return _KeepsAsFla.apply(q, k, v, g, beta), None  # type: ignore[no-untyped-call]


def _attend(
    _module: nn.Module, q: Any, k: Any, v: Any, _mask: object, **options: Any
) -> tuple[torch.Tensor, None]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001
    out = flash(q, k, v, 0.0, True, False, scale=options["scaling"])[0]
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have delta nets and attention keep what they keep on a GPU."""
    AttentionInterface.register("keeps_as_fast", _attend)
    for family in ("qwen3_next", "qwen3_5", "qwen3_5_moe"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(module, "causal_conv1d_fn", _convolve)
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", _delta_rule)
    with torch.device("meta"):
        yield


def model_of(config: dict[str, Any]) -> PreTrainedModel:
    values = {key: value for key, value in config.items() if value is not None}
    shape = AutoConfig.for_model(values.pop("model_type"), **values)
    options = {"experts_implementation": "studio"} if "num_experts" in config else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        shape, dtype=torch.bfloat16, attn_implementation="keeps_as_fast", **options
    )
    return model.requires_grad_(False)


def saved_bytes(base: PreTrainedModel, layer: nn.Module) -> int:
    """Return the bytes of all storages that a layer saves for backward, its weights apart."""
    decoder = base.get_decoder()  # type: ignore[no-untyped-call]
    hidden = torch.empty(1, TOKENS, base.config.hidden_size, dtype=torch.bfloat16)
    rotary = decoder.rotary_emb(hidden, torch.zeros(1, TOKENS, dtype=torch.long))
    apart = {id(each.untyped_storage()) for each in (*base.parameters(), *rotary)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in apart:
            saved[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden.requires_grad_() * 1, position_embeddings=rotary, attention_mask=None)
    return sum(storage.nbytes() for storage in saved.values())


def choices(config: dict[str, Any]) -> dict[str, LoraSpec | None]:
    """Return no LoRA at all (all weights train), few layers, all linear ones, and experts too."""
    there = {module.group for module in target_modules(config) if module.layer is not None}
    bare = {TargetGroup.ROUTED_EXPERTS, TargetGroup.ROUTER} & there
    groups = {"few": {TargetGroup.ATTENTION}, "linear": there - bare, "experts": there}
    return {"full": None} | {
        name: LoraSpec(rank=16, targets=tuple(chosen)) for name, chosen in groups.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_keeps_what_autograd_saves_of_it(name: str) -> None:
    config = MODELS[name]
    architecture = read_architecture(config)
    for lora in choices(config).values():
        base = model_of(config)
        if lora is None:
            base.requires_grad_(True)
        else:
            add_adapter(base, lora)
        run = Pass(tokens=TOKENS, rows=1, compute_bytes=2, is_fused=True, trains_all=lora is None)
        chosen = selected(config, lora) if lora is not None else []
        for number in (2, 3):  # a delta net, where the model has any, and attention
            ranks = {m.leaf: 16 for m in chosen if m.layer == number}
            measured = saved_bytes(base, decoder_layers(base)[number])
            predicted = kept_bytes(architecture, number, ranks, run)
            assert predicted == pytest.approx(measured, rel=0.025)
