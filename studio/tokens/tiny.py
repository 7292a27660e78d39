"""Tokenizers of the tiny models, trained here on the example data: no download, no transformers.

The page reads Datasets as a tiny model does before any worker has built that model, so the
tokenizer is made from the `tokenizers` library alone. The same template gives the same bytes each
time, and transformers' AutoTokenizer loads the folder as any other.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer

from studio.disk import TEMPLATES
from studio.domain.chat_template import render
from studio.domain.openai_messages import from_openai
from studio.domain.preset import KnownModel
from studio.errors import InputError, disk_errors
from studio.whole import locked, whole_folder

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


def ensure_tiny_tokenizer(known: KnownModel, folder: Path) -> Path:
    """Return a folder with the tokenizer of a tiny model; build it where it is not there yet.

    Args:
        known: Template of the model.
        folder: Where tokenizer.json, tokenizer_config.json and chat_template.jinja stand, or
            shall stand. It appears whole: who asks at the same time waits for the first.

    Returns:
        `folder`.

    Raises:
        InputError: The template is not one of a model that the studio builds.
        MachineError: The disk is full or read-only.
    """
    check_is_tiny(known)
    with (
        disk_errors(f"building the tokenizer of {known.id}"),
        locked(folder.parent / f".{folder.name}.lock"),
    ):
        if not (folder / "tokenizer.json").exists():
            with whole_folder(folder) as inner:
                write_tokenizer(known, inner)
    return folder


def check_is_tiny(known: KnownModel) -> None:
    """Refuse a model that the studio cannot build.

    Raises:
        InputError: Its template names no chat template or no size of vocabulary.
    """
    if known.chat_template is None or known.vocab_size is None:
        raise InputError(
            f"{known.id} has no chat_template or no vocab_size, so it cannot be built here.",
            "Choose a model whose id starts with tiny/.",
            field="model.id",
        )


def write_tokenizer(known: KnownModel, folder: Path) -> Tokenizer:
    """Train the tokenizer of a tiny model and write its three files.

    Args:
        known: Template of the model; `chat_template` and `vocab_size` are set.
        folder: Where to write; the caller sees to it that nobody sees half of it.

    Returns:
        The tokenizer.
    """
    assert known.chat_template is not None
    template = (TEMPLATES / "chat" / known.chat_template).read_text(encoding="utf-8")
    tokenizer = _train(known, template)
    tokenizer.save(str(folder / "tokenizer.json"))
    # What transformers 5.23 writes for such a tokenizer; nothing else reads `backend`.
    values = {
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": int(known.config["max_position_embeddings"]),
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "TokenizersBackend",
    }
    config = json.dumps(values, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return tokenizer


def _train(known: KnownModel, template: str) -> Tokenizer:
    assert known.vocab_size is not None
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
    trainer = BpeTrainer(
        vocab_size=known.vocab_size - len(_SPECIAL) - len(_MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(template), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _MARKS])
    return tokenizer


def _texts(template: str) -> Iterator[str]:
    """Yield the example data as the model will read it, cut at the tokens that are never split."""
    marks = re.compile("|".join(re.escape(token) for token in (*_SPECIAL, *_MARKS)))
    for line in _EXAMPLES.read_text(encoding="utf-8").splitlines():
        conversation = from_openai(json.loads(line))
        text = render(template, conversation.template_messages(), tools=conversation.tools)
        yield from marks.split(text)
