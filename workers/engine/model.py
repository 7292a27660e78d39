"""Base weights (NF4 or 16 bits), tokenizer and LoRA: every process that loads a model loads it here.

On CUDA the 16-bit parts are bfloat16. On a CPU they are the same values held in float32: the
arithmetic of small models is faster there, and nothing is rounded twice.
Not covered: 3-D routed experts stay 16-bit (bitsandbytes quantises nn.Linear only; the coverage
Proof says so), vision towers (the text class is loaded), more than one card.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from studio.disk import TEMPLATES, Home
from studio.domain.preset import load_models
from studio.domain.spec import ModelRef
from studio.errors import EngineError, NotFoundError
from workers.engine.hub import check_folder, download
from workers.engine.tiny import ensure_tiny

Method = Literal["qlora", "lora"]

# Suffixes that stay 16-bit in QLoRA. lm_head: the list replaces transformers' default, which holds
# it. The others are a handful of rows each (gates of the delta net and of the shared expert), so
# 4 bits save nothing and cost precision. The router (mlp.gate) is no nn.Linear in transformers 5;
# it is named in case it becomes one.
SIXTEEN_BIT = ("lm_head", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba", "mlp.gate")


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
    if not isinstance(tokenizer.chat_template, str) or not tokenizer.is_fast:
        raise EngineError(
            f"The tokenizer in {folder} has no chat template or no tokenizer.json.",
            "Choose the Instruct weights, or add the chat_template.jinja published with them.",
        )
    return tokenizer


def load_base(
    folder: Path, *, method: Method, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load frozen base weights in evaluation mode.

    Args:
        folder: A Hugging Face folder, as `find_base` returns it.
        method: qlora quantises linear layers to NF4 with double quantisation (QLoRA,
            arXiv 2305.14314, section 3) while loading; lora keeps 16 bits.
        device: Where the weights live.

    Raises:
        EngineError: The weights cannot be read or do not fit the configuration.
    """
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            quantization_config=_nf4(dtype) if method == "qlora" else None,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise EngineError(
            f"The base weights in {folder} cannot be read: {first_line(error)}.",
            "Compare the folder with the published one; a download may be incomplete.",
        ) from error
    model: PreTrainedModel = loaded[0]
    _refuse_gaps(folder, loaded[1])
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16, eval() repacks the weight in place and cuts the gradient
            # of every later backward: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078
            module.support_avx512bf16_for_cpu = False
    # Not peft's prepare_model_for_kbit_training: it casts embeddings and experts to float32.
    model.requires_grad_(False)
    model.train(False)
    return model


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(SIXTEEN_BIT),
    )


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
