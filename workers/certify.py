"""Certify a Merge: re-read what was written, load it, and compare it with base + Adapter.

Nothing is taken from the memory of the merge: tensors come from the disk again, the meaning of
the Adapter from PEFT's own reading, and the answers from the folder as anyone would load it.
Not covered: the vision tower and multi-token prediction, which are only shown to be unchanged.
"""

import gc
import hashlib
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.disk import OrderFolder
from studio.domain.certificate import Certificate, PromptCheck
from studio.domain.chat_template import render
from studio.domain.orders import MergeOrder
from studio.errors import EngineError
from workers.adapter import WEIGHTS
from workers.carried import changes_carried, summed_up
from workers.engine.lora import load_adapter
from workers.engine.model import load_base, load_tokenizer
from workers.engine.report import PACKAGES
from workers.meaning import meanings
from workers.process import best_device, tell_stage
from workers.shards import Shards, changed_tensors, find_shards
from workers.trained import what_changed

_QUESTIONS = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many days has a leap year?",
    "Translate 'good morning' into German.",
    "Give me a function that adds two numbers, in Python.",
)
_PLAIN_TEXT = "The tide is the rise and fall of the sea, caused by the moon and the sun."
# Short prompts miss faults of the rotary embedding, which grow with the position.
_LONG_TOKENS = 500
_LONG_TEXT = " ".join(
    f"On day {day} the station of harbour {day % 7} measured {day * 37 % 91} centimetres."
    for day in range(1, 60)
)

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_ROOM_SHARE = 1.1  # weights, Adapter and the logits of one prompt

Prompts = dict[str, torch.Tensor]  # (1, tokens) by what the certificate calls the prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """What a Merge shall say.

    Attributes:
        logits: (tokens, vocabulary) on the CPU, in the precision of the model, by prompt.
        effect_kl: KL(tuned || base) in nats, by prompt.
    """

    logits: dict[str, torch.Tensor]
    effect_kl: dict[str, float]


def certify(folder: OrderFolder, *, order: MergeOrder, base: Shards, merged: Path) -> Certificate:
    """Measure a Merge.

    Args:
        folder: Folder of the order, told how far it is.
        order: What was asked for.
        base: Shards of the base.
        merged: Folder of the merged model, all files written.

    Returns:
        The Certificate, which may say that the Merge fails.

    Raises:
        EngineError: A folder cannot be read or loaded at all.
    """
    written = find_shards(merged)
    if order.adapter is not None:
        tensors = _adapter_tensors(folder, Path(order.adapter), base, written)
    else:
        tensors = _trained_tensors(folder, find_shards(Path(str(order.trained))), base, written)
    tell_stage(folder, "asking", "the tuned model and its base", 0.65)
    prompts = _prompts(load_tokenizer(merged))
    before = _ask_tuned(order, base, prompts)
    _free_memory()
    tell_stage(folder, "asking", "the merged model", 0.8)
    checks = _ask_merged(written, prompts, before)
    tell_stage(folder, "hashing", "every file", 0.9)
    return Certificate(
        **tensors,
        base_model=order.model.id,
        base_revision=_commit(base.folder) or order.model.revision,
        num_tensors=len(written.file_of),
        files={
            str(path.relative_to(merged)): sha256(path)
            for path in sorted(merged.rglob("*"))
            if path.is_file()
        },
        prompts=checks,
        versions={"python": python_version(), **{name: version(name) for name in PACKAGES}},
    )


def _trained_tensors(
    folder: OrderFolder, trained: Shards, base: Shards, written: Shards
) -> dict[str, Any]:
    """Return what a Certificate says of the tensors of a model that was trained as a whole."""
    tell_stage(folder, "comparing", "every tensor with the base and with what the run wrote", 0.5)
    found = what_changed(base, trained, written)
    return {"kind": "full", "dtype": _dtype(written), **asdict(found)}


def _dtype(model: Shards) -> str:
    """Return the precision of most of the weights, as PyTorch calls it."""
    counts = Counter(dtype for _shape, dtype in model.layout_of.values())
    name = counts.most_common(1)[0][0]
    return _DTYPES.get(name, name)


def _adapter_tensors(
    folder: OrderFolder, adapter: Path, base: Shards, written: Shards
) -> dict[str, Any]:
    """Return what a Certificate says of the tensors of base + Adapter."""
    tell_stage(folder, "comparing", "every tensor, as re-read from the disk", 0.5)
    changed = changed_tensors(base, written)
    tell_stage(folder, "comparing", "what the tensors carry with what the Adapter means", 0.58)
    measured = changes_carried(meanings(adapter, base.folder), base, written)
    summary = summed_up(measured, changed)
    return {
        "adapter_sha256": sha256(adapter / WEIGHTS),
        "dtype": _dtype(written),
        "targeted_tensors": summary.targeted,
        "changed_tensors": summary.changed,
        "delta_kept": summary.kept,
        "delta_held": summary.held,
        "idle_experts": summary.idle_experts,
    }


def compare(adapter: torch.Tensor, merged: torch.Tensor) -> tuple[float, float, float, float]:
    """Compare logits of one prompt.

    Args:
        adapter: (tokens, vocabulary) of base + Adapter.
        merged: The same of the other model.

    Returns:
        Mean KL in nats, largest difference, spread of the first, share of equal favourites.
    """
    one, other = adapter.float(), merged.float()
    log_p, log_q = one.log_softmax(-1), other.log_softmax(-1)
    # Rounding makes the KL of equal rows slightly negative.
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp(min=0)
    agreement = (one.argmax(-1) == other.argmax(-1)).float().mean()
    largest = (one - other).abs().max()
    return kl.item(), largest.item(), one.std(correction=0).item(), agreement.item()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prompts(tokenizer: PreTrainedTokenizerBase) -> Prompts:
    template = str(tokenizer.chat_template)
    texts = {
        question: render(
            template, [{"role": "user", "content": question}], add_generation_prompt=True
        )
        for question in _QUESTIONS
    }
    texts[_PLAIN_TEXT] = _PLAIN_TEXT
    long = f"{_LONG_TOKENS} tokens: {_LONG_TEXT[:60]}..."
    texts[long] = _LONG_TEXT
    prompts = {
        label: tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for label, text in texts.items()
    }
    prompts[long] = prompts[long][:, :_LONG_TOKENS]
    return prompts


def _ask_tuned(order: MergeOrder, base: Shards, prompts: Prompts) -> Before:
    loaded = load_base(base.folder, method="lora", device=_roomy_device(base))
    if order.adapter is None:
        plain = _all_logits(loaded, prompts)
        del loaded
        _free_memory()
        trained = find_shards(Path(str(order.trained)))
        tuned = load_base(trained.folder, method="lora", device=_roomy_device(trained))
        logits = _all_logits(tuned, prompts)
    else:
        model = load_adapter(loaded, Path(order.adapter))
        logits = _all_logits(model, prompts)
        with model.disable_adapter():
            plain = _all_logits(model, prompts)
    effect_kl = {label: compare(logits[label], plain[label])[0] for label in prompts}
    return Before(logits=logits, effect_kl=effect_kl)


def _all_logits(model: PreTrainedModel | PeftModel, prompts: Prompts) -> dict[str, torch.Tensor]:
    return {label: _logits(model, ids) for label, ids in prompts.items()}


def _ask_merged(merged: Shards, prompts: Prompts, before: Before) -> tuple[PromptCheck, ...]:
    model = load_base(merged.folder, method="lora", device=_roomy_device(merged))
    checks = []
    for label, ids in prompts.items():
        kl, largest, spread, agreement = compare(before.logits[label], _logits(model, ids))
        checks.append(
            PromptCheck(
                prompt=label,
                num_tokens=ids.shape[1],
                mean_kl=kl,
                effect_kl=before.effect_kl[label],
                max_logit_difference=largest,
                logit_spread=spread,
                top1_agreement=agreement,
            )
        )
    del model
    _free_memory()
    return tuple(checks)


@torch.inference_mode()
def _logits(model: PreTrainedModel | PeftModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits[0]
    if not torch.isfinite(logits).all():
        raise EngineError(
            "The model's logits are not finite, so the merge cannot be certified.",
            "The weights are damaged or the training diverged; look at the run's loss.",
        )
    return logits.cpu()


def _roomy_device(model: Shards) -> torch.device:
    """Return the card if the 16-bit weights fit: a base that trains in 4 bits may be too large."""
    device = best_device()
    if device.type == "cuda":
        free_bytes, _total = torch.cuda.mem_get_info(device)
        if model.num_bytes * _ROOM_SHARE > free_bytes:
            return torch.device("cpu")
    return device


def _free_memory() -> None:
    """Give the weights back before the next model is loaded; both may not fit at once."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _commit(folder: Path) -> str | None:
    """Return the commit of a hub model: the hub's cache names its folders snapshots/COMMIT."""
    return folder.name if folder.parent.name == "snapshots" else None
