"""Build the tiny models: real architectures, random weights, no download.

They let the whole studio work without a GPU and without a network: train, merge, chat.
What they know is nothing; they can only learn what they are trained on.
The same template gives the same bytes each time, so that adapters trained on one machine fit
the base that another one builds. Not covered: any likeness to the published weights.
"""

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from studio.domain.preset import KnownModel
from studio.errors import InputError, disk_errors
from studio.tokens.tiny import END_OF_TEXT, TURN_END, check_is_tiny, write_tokenizer
from studio.whole import locked, whole_folder

SEED = 20260901
_DT_RANGE = (0.0005, 0.01)


def ensure_tiny(known: KnownModel, folder: Path) -> Path:
    """Return the folder of a tiny model; build it where it is not there yet.

    Args:
        known: Template of the model; `chat_template` and `vocab_size` are set.
        folder: Where the ordinary Hugging Face folder stands, or shall stand. It appears whole:
            a second process that asks at the same time waits for the first.

    Returns:
        `folder`.

    Raises:
        InputError: The template is not one of a model that the studio builds.
        MachineError: The disk is full or read-only.
    """
    check_is_tiny(known)
    with (
        disk_errors(f"building {known.id}"),
        locked(folder.parent / f".{folder.name}.lock"),
    ):
        if not (folder / "config.json").exists():
            with whole_folder(folder) as inner:
                tokenizer = write_tokenizer(known, inner)
                _save_weights(_model_config(known, tokenizer), inner)
    return folder


def _model_config(known: KnownModel, tokenizer: Tokenizer) -> PreTrainedConfig:
    values, num_tokens = dict(known.config), tokenizer.get_vocab_size()
    size = values.pop("vocab_size", -(-num_tokens // 64) * 64)
    if size < num_tokens:
        raise InputError(
            f"{known.id} has {num_tokens} tokens, but its config.vocab_size is {size}.",
            "Make config.vocab_size at least vocab_size.",
        )
    return AutoConfig.for_model(
        values.pop("model_type"),
        **values,
        vocab_size=size,
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )


def _save_weights(config: PreTrainedConfig, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
        _remember_long(model)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=[config.eos_token_id, config.pad_token_id],
        pad_token_id=config.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)


@torch.no_grad()
def _remember_long(model: nn.Module) -> None:
    """Give every delta net a slow decay, so that what a question says reaches its answer.

    A head keeps exp(-A dt) of its state at each token. transformers starts with A in (0.01, 16)
    and dt = 1.3, so that a random state is gone after one token; published weights have learned
    better. Mamba-2 and flash-linear-attention draw dt evenly in its logarithm and store the
    inverse of softplus (https://github.com/fla-org/flash-linear-attention, gated_deltanet.py);
    so do we, with A = 1 and a range that keeps half of the state for 70 to 1,400 tokens.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".A_log"):
            parameter.zero_()
        elif name.endswith(".dt_bias"):
            low, high = (math.log(value) for value in _DT_RANGE)
            dt = torch.exp(torch.rand_like(parameter) * (high - low) + low)
            parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
