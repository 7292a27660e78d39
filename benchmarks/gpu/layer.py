"""The routed experts of one layer with a LoRA on them: ours beside the stock ways.

    python -m benchmarks.gpu.layer [--models 80b 122b 35b] [--rank 16] [--out FOLDER]
        [--device cpu --tiny]

In 4 bits: the engine's function over its own packed experts, beside transformers' grouped_mm over
bitsandbytes' parametrisation, both without a LoRA and with one (PEFT's target_parameters). In 16
bits: the engine's function, PEFT over grouped_mm, PEFT over Liger's fused experts where they are
installed, and grouped_mm without a LoRA, what the base alone costs. First the gate: output within rounding of float32, gradients of
input, routing weights, A and B with a cosine of 0.999 or more to it. A side that fails it is not
timed. Then, for 2,048 to 32,768 tokens, times forward, and forward and backward, and the peak of
memory beyond weights and inputs; routing at random, and once skewed (Zipf, s = 0.7).
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextExperts

from benchmarks.gpu.clock import peak_of, timed
from benchmarks.gpu.presets import config_of
from benchmarks.gpu.record import Record, arguments, checked
from workers.engine.expert_lora import ParamWrapper
from workers.engine.experts import IMPLEMENTATION
from workers.engine.quantize import expert_weight, keep_state, quantise_experts
from workers.engine.self_tests import limit

MODELS = ("80b", "122b", "35b")
TOKENS = (2048, 4096, 8192, 16384, 32768)
SKEWED_TOKENS, GATE_TOKENS = 8192, 512
SKEW = 0.7
LEAST_COSINE = 0.999
WEIGHTS = ("gate_up_proj", "down_proj")
# T tokens, K experts of a token, E experts, D hidden, I inner


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A way to run experts.

    Attributes:
        name: As in the table.
        implementation: transformers' experts function.
        is_nf4: Whether the base is in 4 bits.
        has_lora: Whether there is a LoRA; without one nothing is trained.
        is_liger: Whether the module is Liger's.
    """

    name: str
    implementation: str
    is_nf4: bool
    has_lora: bool = True
    is_liger: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is the engine's."""
        return self.implementation == IMPLEMENTATION


SIDES = (
    Side(name="ours, NF4", implementation=IMPLEMENTATION, is_nf4=True),
    Side(name="ours, NF4, no LoRA", implementation=IMPLEMENTATION, is_nf4=True, has_lora=False),
    Side(name="bnb, grouped_mm, no LoRA", implementation="grouped_mm", is_nf4=True, has_lora=False),
    Side(name="ours, 16 bits", implementation=IMPLEMENTATION, is_nf4=False),
    Side(name="PEFT, grouped_mm", implementation="grouped_mm", is_nf4=False),
    Side(name="PEFT, Liger", implementation="grouped_mm", is_nf4=False, is_liger=True),
    Side(name="grouped_mm, no LoRA", implementation="grouped_mm", is_nf4=False, has_lora=False),
    # The last of all: PEFT 0.21.2 leaves its parametrisations on what bitsandbytes has parametrised
    # (`ParamWrapper._remove_parametrizations` looks for another class than it has put there), and
    # torch's cache of parametrisations, which all modules of a process share, in disorder.
    Side(name="PEFT, bnb, grouped_mm", implementation="grouped_mm", is_nf4=True),
)


class Layer(nn.Module):
    """Experts as a model holds them, frozen."""

    def __init__(self, record: Record, model: str, side: Side) -> None:
        super().__init__()
        values = config_of(model, is_tiny=record.is_tiny)
        config: Any = AutoConfig.for_model(values.pop("model_type"), **values)
        config._experts_implementation = side.implementation  # noqa: SLF001  # as from_config sets it
        self.top_k = int(config.num_experts_per_tok)
        self.hidden = int(config.hidden_size)
        with torch.device("meta"):
            self.experts = _experts_class(config.model_type, side)(config)
        generator = torch.Generator(record.device).manual_seed(1)
        for name in WEIGHTS:
            shape = self.experts.get_parameter(name).shape
            drawn = torch.empty(shape, dtype=record.dtype, device=record.device)
            drawn.normal_(std=0.02, generator=generator)
            self._keep(name, drawn, side)
        self.requires_grad_(False)

    def _keep(self, name: str, drawn: torch.Tensor, side: Side) -> None:
        parameter = nn.Parameter(drawn, requires_grad=False)
        if side.is_nf4 and side.is_ours:
            parameter = quantise_experts(drawn, drawn.shape)
        self.experts.register_parameter(name, parameter)
        if side.is_nf4 and side.is_ours:
            keep_state(self, f"experts.{name}", parameter)  # type: ignore[arg-type]
        elif side.is_nf4:
            replace_parameter_4bit(self.experts, name, compress_statistics=True, quant_type="nf4")


def _experts_class(model_type: str, side: Side) -> type[nn.Module]:
    if side.is_liger:
        module: Any = importlib.import_module("liger_kernel.transformers.swiglu")
        found: type[nn.Module] = module.LigerExperts
        return found
    known: dict[str, type[nn.Module]] = {
        "qwen3_next": Qwen3NextExperts,
        "qwen3_5_moe_text": Qwen3_5MoeExperts,
    }
    return known[model_type]


def main(argv: Sequence[str] | None = None) -> int:
    """Try and time everything; return 1 when a side of ours fails the gate or breaks."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA of each expert")
    given = checked(parser, argv)
    record = Record("layer", given)
    for side in SIDES:
        for model in given.models:
            settings = {"model": model, "side": side.name}
            if side.is_liger and importlib.util.find_spec("liger_kernel") is None:
                record.row("not installed", **settings)
                continue
            measure = partial(measure_side, record, model, side, given.rank)
            # How a stock way breaks is a finding, no failure of ours.
            before = record.failures
            record.attempt("layer", measure, **settings)
            if not side.is_ours:
                record.failures = before
    return record.exit_code()


def measure_side(record: Record, model: str, side: Side, rank: int) -> None:
    """Build a side, hold it against float32, and time it."""
    layer = build(record, model, side, rank)
    if not passes_gate(record, model, side, layer):
        return
    points = [(tokens, False) for tokens in ((24,) if record.is_tiny else TOKENS)]
    points.append((24 if record.is_tiny else SKEWED_TOKENS, True))
    for tokens, is_skewed in points:
        act = partial(clock, record, model, side, layer, tokens, is_skewed=is_skewed)
        record.attempt("times", act, model=model, side=side.name, tokens=tokens)


def build(record: Record, model: str, side: Side, rank: int) -> Layer:
    """Return experts with a random LoRA: PEFT's own layer, or ours by the same door of PEFT's."""
    layer = Layer(record, model, side)
    if not side.has_lora:
        return layer
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in WEIGHTS],
    )
    if side.is_ours:
        config._register_custom_module({type(layer.experts): ParamWrapper})  # noqa: SLF001
    with record.device:
        inject_adapter_in_model(config, layer)
    generator = torch.Generator(record.device).manual_seed(2)
    for name, parameter in layer.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.empty_like(parameter, dtype=torch.float32)
            parameter.data.normal_(std=0.02, generator=generator)
    return layer


def draw(
    record: Record, layer: Layer, num_experts: int, tokens: int, *, is_skewed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x (T, D), experts and their weights (T, K), and the gradient (T, D) that comes back."""
    generator = torch.Generator(record.device).manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=record.device, generator=generator)

    # Choosing the largest of log(share) + Gumbel noise draws experts by their share.
    places = torch.arange(1, num_experts + 1, device=record.device)
    noise = torch.empty(tokens, num_experts, device=record.device)
    logits = noise.exponential_(generator=generator).log().neg()
    if is_skewed:
        logits = logits - SKEW * places.log()
    weights, index = logits.softmax(1).topk(layer.top_k, dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).to(record.dtype)
    x, up = (normal(tokens, layer.hidden).to(record.dtype) for _ in range(2))
    return x.requires_grad_(), index, weights.requires_grad_(), up


def lora_of(layer: Layer) -> dict[str, nn.Parameter]:
    """Return the factors: A and B of gate_up (the inner wrapper), then of down."""
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def num_experts_of(layer: Layer) -> int:
    """Return the routed experts."""
    inner: Any = layer.experts
    while hasattr(inner, "base_layer"):  # wrappers of PEFT stand in each other
        inner = inner.base_layer
    return int(inner.num_experts)


def run(
    layer: Layer, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, up: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return output and gradients of everything that has one."""
    leaves = {"x": x, "routing weights": weights, **lora_of(layer)}
    output = layer.experts(x, index, weights)
    grads = torch.autograd.grad(output, list(leaves.values()), up)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def passes_gate(record: Record, model: str, side: Side, layer: Layer) -> bool:
    """Compare a side with float32, expert by expert."""
    tokens, count = 24 if record.is_tiny else GATE_TOKENS, num_experts_of(layer)
    given = draw(record, layer, count, tokens, is_skewed=False)
    found = run(layer, *given)
    wanted = reference(record, model, side, layer, given)
    error = float((found["output"].float() - wanted["output"]).norm() / wanted["output"].norm())
    cosines = {
        name: float(
            functional.cosine_similarity(found[name].float().flatten(), value.flatten(), dim=0)
        )
        for name, value in wanted.items()
        if name != "output"
    }
    cosine = min(cosines.values())
    passed = error <= limit(record.dtype) and all(c >= LEAST_COSINE for c in cosines.values())
    record.row(
        "gate", model=model, side=side.name, error=error, cosine=f"{cosine:.5f}", passed=passed,
        cosines=cosines,
    )  # fmt: skip
    return passed


def reference(
    record: Record, model: str, side: Side, layer: Layer, given: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Compute output and gradients in float32 with plain products, one expert after the other."""
    x, index, weights, up = (t.detach().float() if t.is_floating_point() else t for t in given)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    factors = {name: p.detach().clone().requires_grad_() for name, p in lora_of(layer).items()}
    # The wrapper of gate_up stands inside that of down, so its name has one base_layer more.
    by_depth = sorted(factors, key=lambda name: (-name.count("base_layer"), "lora_B" in name))
    low = dict(zip(WEIGHTS, (by_depth[:2], by_depth[2:]), strict=True))
    stacks, scaling = plain_stacks(record, model, side), 2.0
    output = torch.zeros_like(x)
    for expert in torch.unique(index).tolist():
        token, place = (index == expert).nonzero(as_tuple=True)
        h = x[token]
        for name in WEIGHTS:
            weight, count = stacks[name][expert].float(), len(stacks[name])
            if side.has_lora:
                a, b = (factors[factor] for factor in low[name])
                a_e = a.view(count, -1, a.shape[1])[expert]
                b_e = b.view(b.shape[0], -1, count)[..., expert]
                weight = weight + scaling * b_e @ a_e
            h = h @ weight.T
            if name == WEIGHTS[0]:
                gate, values = h.chunk(2, dim=-1)
                h = functional.silu(gate) * values
        output = output.index_add(0, token, h * weights[token, place, None])
    leaves = {"x": x, "routing weights": weights, **factors}
    grads = torch.autograd.grad(output, list(leaves.values()), up)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def plain_stacks(record: Record, model: str, side: Side) -> Mapping[str, torch.Tensor]:
    """Return the weights (E, out, in) that a side multiplies with: the same draw, packed the same."""
    ours = Side(name="", implementation=IMPLEMENTATION, is_nf4=side.is_nf4, has_lora=False)
    experts = Layer(record, model, ours).experts
    return {name: expert_weight(experts, name, record.dtype) for name in WEIGHTS}


def clock(
    record: Record, model: str, side: Side, layer: Layer, tokens: int, *, is_skewed: bool
) -> None:
    """Time a side, and take the peak of its memory."""
    given = draw(record, layer, num_experts_of(layer), tokens, is_skewed=is_skewed)

    def forward() -> object:
        with torch.no_grad():
            return layer.experts(*given[:3])

    def both() -> object:
        return run(layer, *given)

    acts: dict[str, Callable[[], object]] = {"forward": forward, "both": both}
    values: dict[str, Any] = {}
    for name, act in acts.items():
        values |= timed(name, act, record.device)
    peak = peak_of(both, record.device)
    record.row(
        "times", model=model, side=side.name, tokens=tokens, skewed=is_skewed, **values,
        peak_gib=None if peak is None else peak / 2**30,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
