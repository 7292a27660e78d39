"""LoRA: which layers carry one, how it is added, loaded and saved in PEFT's own layout.

Linear layers, embeddings, head and router are PEFT's alone; workers.engine.expert_lora makes the
products of routed experts. Whatever carries a LoRA is named as studio.domain.targets names it:
`model.layers.3.self_attn.q_proj`, `model.layers.3.mlp.experts.down_proj`, `model.layers.3.mlp.gate`.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import transformers_weight_conversion
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from studio.domain.lora_spec import LoraSpec
from studio.domain.outcome import ExitCode
from studio.domain.targets import TargetModule, selected, target_modules
from studio.errors import EngineError
from workers.engine.expert_lora import use_own_experts
from workers.engine.model import first_line

_PEFT_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer"
# Families that PEFT reads as qwen2_moe, see `_shared_experts_stay_apart`.
_MISREAD: tuple[str, ...] = ("qwen3_next", "qwen3_moe")
# Starts that leave the base as it is (peft/tuners/lora/layer.py, update_layer).
_NEUTRAL_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def add_adapter(model: PreTrainedModel, lora: LoraSpec) -> PeftModel:
    """Wrap the selected layers with a fresh float32 LoRA that changes nothing yet.

    One of A and B is zero, the other is drawn from torch's global generator, so seed it before.

    Raises:
        InputError: A target matches nothing in this model, or does not go with the others.
        EngineError: PEFT adapted other layers than the selected ones.
    """
    names = selected_modules(model, lora)
    wrapped = _wrap(model, adapter_config(model, lora))
    check_adapted(wrapped, names)
    return wrapped


def selected_modules(model: PreTrainedModel, lora: LoraSpec) -> list[str]:
    """Return the full names of what a choice selects in a text model.

    Raises:
        InputError: A target matches nothing in this model, or does not go with the others.
    """
    return [module.full_name for module in selected(model.config.to_dict(), lora)]


def adapter_config(model: PreTrainedModel, lora: LoraSpec) -> LoraConfig:
    """Return how PEFT writes a choice down; its own PEFT loads the same layers from it.

    Raises:
        InputError: A target matches nothing in this model, or does not go with the others.
    """
    chosen = selected(model.config.to_dict(), lora)
    experts = [module for module in chosen if module.kind == "experts"]
    other = {m.leaf: m for m in experts if m.lora_rank(lora) != lora.rank}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=[m.full_name for m in chosen if m.kind in ("linear", "embedding")],
        target_parameters=_parameters(target_modules(model.config.to_dict()), chosen) or None,
        rank_pattern={leaf: module.lora_rank(lora) for leaf, module in other.items()},
        alpha_pattern={leaf: module.lora_alpha(lora) for leaf, module in other.items()},
        bias="none",
    )


def load_adapter(base: PreTrainedModel, adapter_folder: Path) -> PeftModel:
    """Load a saved Adapter, ours or another one of PEFT's, onto a base, frozen.

    Raises:
        EngineError: The folder is no Adapter, or does not fit this base.
    """
    try:
        # Before the configuration: without this file PEFT would look for a pickle.
        tensors = load_file(adapter_folder / "adapter_model.safetensors")
        config = PeftConfig.from_pretrained(str(adapter_folder))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"it is no LoRA but {config.peft_type}")
        if config.init_lora_weights not in _NEUTRAL_STARTS:
            raise ValueError(f"its start {config.init_lora_weights!r} changes the base itself")
        config.inference_mode = True
        # PEFT warns when it puts the name of this base in the place of another one.
        base_id, config.base_model_name_or_path = config.base_model_name_or_path, None
        wrapped = _wrap(base, config)
        config.base_model_name_or_path = base_id
        set_adapter_state(wrapped, tensors)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise EngineError(
            f"The Adapter in {adapter_folder} cannot be loaded: {first_line(error)}.",
            "Use an Adapter that was trained on this base model.",
        ) from error
    return wrapped.eval()


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the tensors of the Adapter by the names that PEFT's file has; they are not copied."""
    # Without save_embedding_layers=False PEFT asks the hub whether the vocabulary was resized.
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def set_adapter_state(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrite the Adapter with tensors that `adapter_state` or PEFT's file gave.

    Copies of embeddings or head that PEFT saves beside a LoRA on them overwrite the base's.

    Raises:
        EngineError: Tensors are missing, of other layers or of another shape; nothing is changed.
    """
    expected = adapter_state(model)
    copies = {key for key in tensors if key.endswith(f"{_BASE_LAYER}.weight")}
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys() - copies)
    other = [
        key
        for key in sorted(expected.keys() & tensors.keys())
        if expected[key].shape != tensors[key].shape
    ]
    said = [f"{len(missing)} tensors are missing, as {missing[0]}"] if missing else []
    said += [f"{len(unexpected)} have no place, as {unexpected[0]}"] if unexpected else []
    if other:
        given, here = tuple(tensors[other[0]].shape), tuple(expected[other[0]].shape)
        said.append(f"{len(other)} have another shape, as {other[0]}: {given} for {here}")
    if said:
        raise EngineError(
            f"The Adapter is of another model or of other LoRA targets: {'; '.join(said)}.",
            "Use an Adapter of this model, and a Checkpoint of this run or one like it.",
        )
    with _shared_experts_stay_apart():
        set_peft_model_state_dict(model, dict(tensors))


def base_of(model: PeftModel) -> PreTrainedModel:
    """Return the base model inside; its layers carry the LoRA."""
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return what really carries a LoRA, named as `TargetModule.full_name`."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            path = name.removeprefix(_PEFT_PREFIX).replace(_BASE_LAYER, "")
            if isinstance(module, ParamWrapper) and module.parameter_name != "weight":
                path = f"{path}.{module.parameter_name}"
            layers[path] = module
    return layers


def check_adapted(model: PeftModel, names: Sequence[str]) -> None:
    """Compare what carries a LoRA with what shall.

    Args:
        model: Wrapped by PEFT.
        names: As `TargetModule.full_name`.

    Raises:
        EngineError: They differ; one of each kind is named.
    """
    wanted, found = set(names), set(lora_layers(model))
    if wanted == found:
        return
    lost, extra = sorted(wanted - found), sorted(found - wanted)
    said = [f"{len(lost)} selected layers carry no LoRA, as {lost[0]}"] if lost else []
    said += (
        [f"{len(extra)} layers carry one that were not selected, as {extra[0]}"] if extra else []
    )
    raise EngineError(
        f"PEFT adapted other layers than the selected ones: {'; '.join(said)}.",
        "This is a fault of the studio or of this version of PEFT; see log.txt.",
        code=ExitCode.UNEXPECTED,
    )


def _parameters(modules: Sequence[TargetModule], chosen: Sequence[TargetModule]) -> list[str]:
    """Return PEFT's target_parameters: the end of a name where all layers of that kind have one."""
    names = []
    for leaf in dict.fromkeys(m.leaf for m in chosen if m.kind in ("experts", "router")):
        suffix = ".weight" if leaf.endswith(".gate") else ""
        mine = [m for m in chosen if m.leaf == leaf]
        if len(mine) == sum(m.leaf == leaf for m in modules):
            names.append(leaf + suffix)
        else:
            names += [m.full_name + suffix for m in mine]
    return names


def _wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    experts = [m for m in target_modules(model.config.to_dict()) if m.kind == "experts"]
    targets = tuple(config.target_parameters or ())
    experts = [m for m in experts if targets and f".{m.full_name}".endswith(_dotted(targets))]
    use_own_experts(model, config, experts)
    with _shared_experts_stay_apart(), warnings.catch_warnings():
        # Said of patterns for parameters, which PEFT 0.21 heeds but does not look for.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        # Born on the device: experts have so many parameters that a CPU draws them for minutes.
        with model.device:
            wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def _dotted(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)


@contextmanager
def _shared_experts_stay_apart() -> Iterator[None]:
    """Keep PEFT from moving a LoRA on shared experts and dense layers to the routed experts.

    PEFT 0.21.2 reads them as qwen2_moe and rewrites every target that ends in gate_proj,
    up_proj or down_proj into target_parameters of the routed experts, silently
    (https://github.com/huggingface/peft/issues/3711, open). PEFT offers no switch, so the entries
    are taken out of PEFT's own copy of the table while the layers are wrapped, and put back.
    """
    table: dict[str, str] = vars(transformers_weight_conversion)["_MODEL_TO_CONVERSION_PATTERN"]
    entries = {name: table.pop(name) for name in _MISREAD if name in table}
    try:
        yield
    finally:
        table.update(entries)
