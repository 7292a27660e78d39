"""Targets and shapes against the real module trees: transformers builds them without memory."""

import json
import math
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from studio.disk import TEMPLATES, Home
from studio.domain.architecture import Mixer, read_architecture
from studio.domain.lora_spec import LoraSpec
from studio.domain.preset import load_models
from studio.domain.shapes import check_shapes, tensor_shapes
from studio.domain.spec import ModelRef
from studio.domain.targets import (
    TargetGroup,
    TargetModule,
    count_by_group,
    lora_parameters,
    selected,
    target_modules,
)
from workers.engine.lora import add_adapter
from workers.engine.model import find_base, load_base

MODELS = load_models(TEMPLATES / "models")
TINY = [name for name, known in MODELS.items() if known.is_built_here]
LINEAR = [group for group in TargetGroup if group.value not in ("routed_experts", "router")]
each_model = pytest.mark.parametrize("name", MODELS)
each_tiny = pytest.mark.parametrize("name", TINY)


def real_model(name: str) -> PreTrainedModel:
    """Build transformers' own model without memory for weights."""
    values = dict(MODELS[name].config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


@cache
def base(name: str) -> PreTrainedModel:
    """Return the model of that name, built once; nobody may change it."""
    return real_model(name)


@each_model
def test_every_parameter_of_the_real_model_has_its_shape(name: str) -> None:
    model = base(name)
    real = {path: tuple(value.shape) for path, value in model.named_parameters()}
    architecture = read_architecture(MODELS[name].config)

    assert tensor_shapes(architecture) == real
    check_shapes(architecture, real)
    assert sum(math.prod(shape) for shape in tensor_shapes(architecture).values()) == (
        model.num_parameters()
    )


@each_model
def test_targets_are_exactly_what_holds_a_matrix_in_the_real_model(name: str) -> None:
    found: dict[str, tuple[str, int, int, int]] = {}
    for path, module in base(name).named_modules():
        if isinstance(module, nn.Linear):
            found[path] = ("linear", module.in_features, module.out_features, 1)
        elif isinstance(module, nn.Embedding):
            found[path] = ("embedding", module.num_embeddings, module.embedding_dim, 1)
        for leaf, value in module.named_parameters(recurse=False):
            if type(module).__name__.endswith("Experts"):
                count, rows, columns = value.shape
                found[f"{path}.{leaf}"] = ("experts", columns, rows, count)
            elif type(module).__name__.endswith("TopKRouter"):
                rows, columns = value.shape
                found[path] = ("router", columns, rows, 1)
    targets = target_modules(MODELS[name].config)

    assert {
        module.full_name: (
            module.kind,
            module.in_features,
            module.out_features,
            module.num_experts,
        )
        for module in targets
    } == found
    assert len(targets) == len(found)


@each_model
def test_sizes_of_the_attention_are_those_of_the_real_model(name: str) -> None:
    architecture = read_architecture(MODELS[name].config)
    layers = base(name).model.layers
    real = [Mixer.DELTA_NET if hasattr(x, "linear_attn") else Mixer.ATTENTION for x in layers]
    assert [layer.mixer for layer in architecture.layers] == real
    last = layers[-1]
    assert last.self_attn.head_dim == architecture.head_dim
    if architecture.experts is not None:
        assert last.mlp.gate.top_k == architecture.experts.top_k


# Millions of trainable parameters at rank 16: attention, DeltaNet, gates, dense MLP, shared expert
# with its gate, router, routed experts; and all parameters of the text model in millions. Counted
# once by PEFT and transformers on the published configs; the last column agrees with the names of
# the models and, for Qwen3, with the 8.2, 32.8 and 30.5 billion of their model cards.
PUBLISHED = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (4.1, 11.8, 1.2, None, 7.5, 2.0, 2214.6, 79_674),
    "Qwen/Qwen3.5-9B": (3.9, 11.0, 3.2, 25.2, None, None, None, 8_954),
    "Qwen/Qwen3.5-27B": (10.5, 29.1, 7.9, 69.2, None, None, None, 26_896),
    "Qwen/Qwen3.5-35B-A3B": (3.4, 10.8, 2.0, None, 6.2, 1.5, 922.7, 34_661),
    "Qwen/Qwen3.5-122B-A10B": (7.3, 21.8, 3.6, None, 11.8, 2.6, 1811.9, 122_112),
    "Qwen/Qwen3-8B": (15.3, None, None, 28.3, None, None, None, 8_191),
    "Qwen/Qwen3-32B": (39.8, None, None, 94.4, None, None, None, 32_762),
    "Qwen/Qwen3-30B-A3B": (13.4, None, None, None, None, 1.7, 629.1, 30_532),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_the_published_models(name: str) -> None:
    counts = count_by_group(target_modules(MODELS[name].config), LoraSpec(rank=16))
    counts[TargetGroup.SHARED_EXPERT] = counts.get(TargetGroup.SHARED_EXPERT, 0) + counts.get(
        TargetGroup.SHARED_EXPERT_GATE, 0
    )
    columns = (
        TargetGroup.ATTENTION,
        TargetGroup.DELTA_NET,
        TargetGroup.DELTA_NET_GATES,
        TargetGroup.DENSE_MLP,
        TargetGroup.SHARED_EXPERT,
        TargetGroup.ROUTER,
        TargetGroup.ROUTED_EXPERTS,
    )
    found = [round(counts[g] / 1e6, 1) if counts.get(g) else None for g in columns]

    assert (*found, round(base(name).num_parameters() / 1e6)) == PUBLISHED[name]


# ---- PEFT on the tiny members -----------------------------------------------------------------


def trainable(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def modules_of(name: str, *groups: TargetGroup) -> list[TargetModule]:
    return [module for module in target_modules(MODELS[name].config) if module.group in groups]


def peft_counts(name: str, config: LoraConfig, chosen: list[TargetModule]) -> dict[str, int]:
    """Return what PEFT trains in each chosen module; experts and router are found by their place."""
    found = dict.fromkeys((module.full_name for module in chosen), 0)
    for path, value in get_peft_model(real_model(name), config).named_parameters():
        if value.requires_grad:
            place = path.removeprefix("base_model.model.").split(".lora_")[0]
            if place.endswith("experts.base_layer"):
                place = place.replace("base_layer", "gate_up_proj")
            elif place.endswith("experts"):
                place += ".down_proj"
            found[place] += value.numel()
    return found


@each_tiny
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_counts_of_linear_layers_and_embeddings_are_those_of_peft(name: str, dora: bool) -> None:
    chosen = [
        module
        for module in modules_of(name, *LINEAR)
        # PEFT moves these elsewhere; the engine's add_adapter does not let it.
        if not (name.startswith("tiny/qwen3-next") and "shared_expert." in module.name)
        and not (dora and module.kind == "embedding")
    ]
    config = LoraConfig(r=4, target_modules=[m.full_name for m in chosen], use_dora=dora)
    lora = LoraSpec(rank=4, dora=dora)

    assert peft_counts(name, config, chosen) == {
        module.full_name: module.lora_parameters(lora) for module in chosen
    }


# PEFT 0.21 says so of every key that names a parameter, and uses it all the same.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("name", [name for name in TINY if "num_experts" in MODELS[name].config])
def test_counts_of_bare_parameters_are_those_of_peft(name: str) -> None:
    chosen = modules_of(name, TargetGroup.ROUTED_EXPERTS, TargetGroup.ROUTER)
    paths = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraSpec(rank=6, expert_rank="divided")
    ranks = {module.leaf: module.lora_rank(lora) for module in chosen if module.kind == "experts"}
    config = LoraConfig(r=6, target_modules=[], target_parameters=paths, rank_pattern=ranks)

    assert set(ranks.values()) == {3}
    assert peft_counts(name, config, chosen) == {
        module.full_name: module.lora_parameters(lora) for module in chosen
    }


@each_tiny
def test_counts_are_those_of_the_engines_own_adapter(name: str) -> None:
    present = {module.group for module in target_modules(MODELS[name].config)}
    lora = LoraSpec(rank=4, targets=tuple(present), expert_rank="divided")

    found = trainable(add_adapter(real_model(name), lora))
    assert found == lora_parameters(selected(MODELS[name].config, lora), lora)


# ---- the files of a model, as transformers writes them -----------------------------------------


@pytest.mark.parametrize("name", ["tiny/qwen3", "tiny/qwen3-moe", "tiny/qwen3-next"])
def test_files_of_a_model_fit_the_config_beside_them(name: str, home: Home) -> None:
    folder = find_base(ModelRef(id=name), home)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    architecture = read_architecture(config)

    # Experts stand in the files one by one, as hubs publish them.
    assert any(".experts.3.gate_proj." in key for key in shapes) == (
        architecture.experts is not None
    )
    check_shapes(architecture, shapes)
    assert tensor_shapes(architecture) == tensor_shapes(read_architecture(MODELS[name].config))
    model = load_base(folder, method="lora")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert bool(torch.isfinite(model(tokens).logits).all())
