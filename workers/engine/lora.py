"""LoRA: which layers carry one, how it is added, loaded and saved in PEFT's own layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import transformers_weight_conversion
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from studio.domain.lora_spec import LoraSpec
from studio.domain.targets import select, target_modules
from studio.errors import EngineError
from workers.engine.model import first_line

_PEFT_PREFIX = "base_model.model."


def add_adapter(model: PreTrainedModel, lora: LoraSpec) -> PeftModel:
    """Wrap the selected layers with a fresh float32 LoRA (B is zero: nothing changes yet).

    A is drawn from torch's global generator, so seed it before.

    Raises:
        InputError: A target group matches nothing in this model.
        EngineError: PEFT adapted other layers than the selected ones.
    """
    names = selected_modules(model, lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=lora.dropout,
        target_modules=names,
        bias="none",
    )
    with _shared_experts_stay_apart():
        wrapped = get_peft_model(model, config)
    check_adapted(wrapped, names)
    return wrapped


def load_adapter(base: PreTrainedModel, adapter_folder: Path) -> PeftModel:
    """Load a saved Adapter onto a base, frozen.

    Raises:
        EngineError: The folder is no Adapter, or does not fit this base.
    """
    try:
        with safe_open(adapter_folder / "adapter_model.safetensors", framework="pt") as file:
            keys = list(file.keys())
        with _shared_experts_stay_apart():
            wrapped = PeftModel.from_pretrained(base, adapter_folder, is_trainable=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EngineError(
            f"The Adapter in {adapter_folder} cannot be loaded: {first_line(error)}.",
            "Use an Adapter that was trained on this base model.",
        ) from error
    names = {key.removeprefix(_PEFT_PREFIX).rsplit(".lora_", 1)[0] for key in keys}
    check_adapted(wrapped, sorted(names))
    return wrapped.eval()


def selected_modules(model: PreTrainedModel, lora: LoraSpec) -> list[str]:
    """Return the full names of the layers that `lora.targets` selects in a text model.

    Raises:
        InputError: A target group matches nothing in this model.
    """
    modules = target_modules(model.config.to_dict())
    return [f"model.{module.name}" for module in select(modules, lora.targets)]


def base_of(model: PeftModel) -> PreTrainedModel:
    """Return the base model inside; its layers carry the LoRA."""
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the layers that really carry a LoRA, by their full name in the base."""
    return {
        name.removeprefix(_PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def check_adapted(model: PeftModel, names: Sequence[str]) -> None:
    """Compare the layers that carry a LoRA with those that shall.

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
    )


@contextmanager
def _shared_experts_stay_apart() -> Iterator[None]:
    """Keep PEFT from moving Qwen3-Next's shared-expert LoRA to the routed experts.

    PEFT 0.21.2 reads `qwen3_next` as `qwen2_moe` and rewrites every target that ends in gate_proj,
    up_proj or down_proj into target_parameters of the routed experts, silently
    (https://github.com/huggingface/peft/issues/3711, open). PEFT offers no switch, so the entry
    is taken out of PEFT's own copy of the table while the layers are wrapped, and put back.
    """
    table: dict[str, str] = vars(transformers_weight_conversion)["_MODEL_TO_CONVERSION_PATTERN"]
    entry = table.pop("qwen3_next", None)
    try:
        yield
    finally:
        if entry is not None:
            table["qwen3_next"] = entry
