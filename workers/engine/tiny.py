"""Build the tiny models: real architectures and tokenizers, random weights, no download.

They let the whole studio work without a GPU and without a network: train, merge, chat.
What they know is nothing; they can only learn what they are trained on.
The same template gives the same bytes each time, so that adapters trained on one machine fit
the base that another one builds. Not covered: any likeness to the published weights.
"""

import fcntl
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from studio.disk import TEMPLATES
from studio.domain.chat_template import render
from studio.domain.conversation import from_openai
from studio.domain.preset import KnownModel
from studio.errors import InputError, disk_errors

SEED = 20260901
_DT_RANGE = (0.0005, 0.01)
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_SPECIAL = (END_OF_TEXT, TURN_START, TURN_END)
# Qwen adds these as ordinary tokens, so that decoding without special tokens keeps them:
# added_tokens_decoder in tokenizer_config.json of https://huggingface.co/Qwen/Qwen3.5-9B
_MARKS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
# Pre-tokenizer of Qwen2 and later: tokenizer.json of https://huggingface.co/Qwen/Qwen2.5-7B
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXAMPLES = TEMPLATES / "data" / "tidemark-support.jsonl"


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
    if known.chat_template is None or known.vocab_size is None:
        raise InputError(
            f"{known.id} has no chat_template or no vocab_size, so it cannot be built here.",
            "Choose a model whose id starts with tiny/.",
            field="model.id",
        )
    with disk_errors(f"building {known.id}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{folder.name}.lock"):
            if not (folder / "config.json").exists():
                _build_beside(known, folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_beside(known: KnownModel, folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        tokenizer = _build_tokenizer(known)
        tokenizer.save_pretrained(temporary)
        _save_weights(_model_config(known, tokenizer), temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build_tokenizer(known: KnownModel) -> PreTrainedTokenizerFast:
    assert known.vocab_size is not None
    assert known.chat_template is not None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    template = (TEMPLATES / "chat" / known.chat_template).read_text(encoding="utf-8")
    trainer = BpeTrainer(
        vocab_size=known.vocab_size - len(_SPECIAL) - len(_MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(template), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _MARKS])
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=int(known.config["max_position_embeddings"]),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template
    return wrapped


def _texts(template: str) -> Iterator[str]:
    """Yield the example data as the model will read it, cut at the tokens that are never split."""
    marks = re.compile("|".join(re.escape(token) for token in (*_SPECIAL, *_MARKS)))
    for line in _EXAMPLES.read_text(encoding="utf-8").splitlines():
        conversation = from_openai(json.loads(line))
        text = render(template, conversation.template_messages(), tools=conversation.tools)
        yield from marks.split(text)


def _model_config(known: KnownModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    values = dict(known.config)
    size = values.pop("vocab_size", -(-len(tokenizer) // 64) * 64)
    if size < len(tokenizer):
        raise InputError(
            f"{known.id} has {len(tokenizer)} tokens, but its config.vocab_size is {size}.",
            "Make config.vocab_size at least vocab_size.",
        )
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return AutoConfig.for_model(
        values.pop("model_type"),
        **values,
        vocab_size=size,
        eos_token_id=ends[0],
        pad_token_id=ends[1],
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
