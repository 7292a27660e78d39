"""Base weights (NF4 or 16 bits) and tokenizer: every process that loads a model loads it here.

On CUDA the 16-bit parts are bfloat16. On a CPU they are the same values held in float32: the
arithmetic of small models is faster there, and nothing is rounded twice.
Not covered: vision towers (the text class is loaded), a base on more than one card.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from studio.disk import TEMPLATES, Home
from studio.domain.preset import load_models
from studio.domain.spec import ModelRef
from studio.errors import EngineError, MachineError, NotFoundError
from workers.engine.check_model import check_folder, template_for
from workers.engine.experts import IMPLEMENTATION
from workers.engine.hub import download
from workers.engine.quantized_cache import QuantizedCache
from workers.engine.quantizer import Nf4Config
from workers.engine.tiny import ensure_tiny

log = logging.getLogger(__name__)

Method = Literal["qlora", "lora", "full"]


def find_base(model: ModelRef, home: Home) -> Path:
    """Return the folder of base weights; build or download it where it is not there yet.

    Args:
        model: `tiny/NAME`, the path of a Hugging Face folder, or a hub id with revision.
        home: The home folder; tiny models are built under its `models`.

    Raises:
        NotFoundError: There is no such tiny model, folder, hub repository or revision.
        InputError: The folder holds no model that the studio trains, or no safetensors.
        EngineError: The hub cannot be reached or refuses access.
    """
    if model.id.startswith("tiny/"):
        known = load_models(TEMPLATES / "models")
        if model.id not in known:
            names = ", ".join(name for name in known if name.startswith("tiny/"))
            raise NotFoundError(
                f"There is no tiny model {model.id!r}.", f"Choose one of: {names}.", "model.id"
            )
        return ensure_tiny(known[model.id], home.models / model.id.removeprefix("tiny/"))
    path = Path(model.id).expanduser()
    if path.is_dir():
        return check_folder(path.resolve(), model.id)
    if path.is_absolute() or model.id.startswith((".", "~")):
        raise NotFoundError(
            f"There is no folder {model.id}.",
            "Give the path of a Hugging Face model folder on the machine of the worker.",
            "model.id",
        )
    return download(model)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        EngineError: It is missing, unreadable, has no chat template or no offsets.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(
            f"The tokenizer in {folder} cannot be read: {first_line(error)}.",
            "Give a folder with tokenizer.json and tokenizer_config.json.",
        ) from error
    if not tokenizer.is_fast:
        raise EngineError(
            f"The model in {folder} has no readable tokenizer.json.",
            "Put the tokenizer.json published with the weights there.",
            "model.id",
        )
    if not isinstance(tokenizer.chat_template, str):
        template = template_for(folder)
        raise EngineError(
            f"The model in {folder} has no chat template.",
            "Choose the Instruct weights, or add the chat_template.jinja published with them."
            if template is None
            else f"Choose the Instruct weights, or copy {template} there as chat_template.jinja.",
            "model.id",
        )
    _refuse_other_vocabulary(tokenizer, folder)
    return tokenizer


def _refuse_other_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a tokenizer with tokens that the model has no row for: they would end on the card."""
    file = folder / "config.json"
    if not file.exists():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    num_rows = config.get("text_config", config).get("vocab_size")
    num_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_rows is not None and num_tokens > num_rows:
        raise EngineError(
            f"The tokenizer in {folder} has {num_tokens:,} tokens, and the model knows "
            f"{num_rows:,}: they are not of the same model.",
            "Put the tokenizer.json published with the weights there.",
            "model.id",
        )


def load_base(
    folder: Path,
    *,
    method: Method,
    device: torch.device | str = "cpu",
    cache: QuantizedCache | None = None,
    storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:
    """Load base weights in evaluation mode, frozen unless all of them are trained.

    Args:
        folder: A Hugging Face folder, as `find_base` returns it.
        method: qlora quantises linear layers and routed experts to NF4 with double quantisation
            while loading: memory holds the quantised weights and about one layer. lora and full
            keep 16 bits; full leaves all weights trainable.
        device: Where the weights live.
        cache: Where weights in 4 bits are kept for the next start; None keeps none.
        storage: Dtype that packed bytes are kept in; a float under FSDP2.

    Raises:
        EngineError: The weights cannot be read or do not fit the configuration.
        MachineError: The device has not the memory.
    """
    device = torch.device(device)
    if method != "qlora":
        model = _read(folder, folder, device)
    elif cache is None:
        model = _read(folder, folder, device, Nf4Config(_dtype(device), storage))
    else:
        model = _read_quantised(folder, device, Nf4Config(_dtype(device), storage), cache)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16, eval() repacks the weight in place and cuts the gradient
            # of every later backward: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078
            module.support_avx512bf16_for_cpu = False
    # Not peft's prepare_model_for_kbit_training: it casts embeddings and experts to float32.
    model.requires_grad_(method == "full")
    model.train(False)
    return model


def _read_quantised(
    folder: Path, device: torch.device, settings: Nf4Config, cache: QuantizedCache
) -> PreTrainedModel:
    """Load from the cache, or load the base and fill the cache."""
    # A card's kernels may round otherwise than the CPU's.
    entry = cache.entry(folder, {**settings.to_dict(), "device": device.type})
    if entry is None:
        return _read(folder, folder, device, settings)
    with cache.reading(entry) as is_whole:
        if is_whole:
            try:
                return _read(folder, entry, device, settings)
            except EngineError as error:
                log.warning("The kept weights in 4 bits are made anew: %s", error.message)
    model = _read(folder, folder, device, settings)
    try:
        cache.store(model, folder, entry)
    except MachineError as error:
        log.warning("The weights in 4 bits are not kept for the next start: %s", error.message)
    return model


def _read(
    folder: Path, weights: Path, device: torch.device, settings: Nf4Config | None = None
) -> PreTrainedModel:
    """Load `weights`: the base's own folder, or one in 4 bits that was made of it."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if weights != folder and settings is not None:
            config.quantization_config = settings.to_dict()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            weights,
            config=config,
            dtype=_dtype(device),
            device_map={"": device},
            quantization_config=settings if weights == folder else None,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **_experts(config),
        )
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"The base weights in {folder} do not fit into the memory of {device}.",
            "Choose method qlora, a smaller model, or a card with more memory.",
            "model.id",
        ) from error
    # RuntimeError: transformers' word for tensors of other shapes.
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise EngineError(
            f"The base weights in {weights} cannot be read: {first_line(error)}.",
            "Compare the folder with the published one; a download may be incomplete.",
        ) from error
    model: PreTrainedModel = loaded[0]
    _refuse_gaps(weights, loaded[1])
    model.name_or_path = model.config.name_or_path = str(folder)
    return model


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _experts(config: PreTrainedConfig) -> dict[str, str]:
    """Return what selects our function for routed experts, where the model has any."""
    if not getattr(config.get_text_config(), "num_experts", 0):
        return {}
    return {"experts_implementation": IMPLEMENTATION}


def _refuse_gaps(folder: Path, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise EngineError(
            f"The weights in {folder} lack {len(missing)} tensors, the first is {missing[0]}.",
            "Compare the folder with the published one; a download may be incomplete.",
        )


def first_line(error: Exception) -> str:
    """Return the first line of what an exception of a library says, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
