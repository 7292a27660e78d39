"""Certify a Merge: re-read what was written, load it, and compare it with base + Adapter.

Nothing is taken from the memory of the merge: tensors come from the disk again, the meaning of
the Adapter from PEFT's own product, and the answers from the folder as anyone would load it.
Not covered: the vision tower and multi-token prediction, which are only shown to be unchanged.
"""

import gc
import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.disk import OrderFolder
from studio.domain.certificate import Certificate, PromptCheck
from studio.domain.chat_template import render
from studio.domain.orders import MergeOrder
from studio.errors import EngineError
from workers.adapter import WEIGHTS
from workers.engine.lora import load_adapter
from workers.engine.model import load_base, load_tokenizer
from workers.engine.report import PACKAGES
from workers.process import best_device, tell_stage
from workers.shards import Shards, find_shards, open_shard, same_bits

_PEFT_PREFIX = "base_model.model."
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

_ROOM_SHARE = 1.1  # weights, Adapter and the logits of one prompt

Prompts = dict[str, torch.Tensor]  # (1, tokens) by what the certificate calls the prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """What base + Adapter say.

    Attributes:
        logits: (tokens, vocabulary) on the CPU, in the precision of the model, by prompt.
        effect_kl: KL(base + Adapter || base) in nats, by prompt.
        delta_kept: See Certificate.
        delta_held: See Certificate.
    """

    logits: dict[str, torch.Tensor]
    effect_kl: dict[str, float]
    delta_kept: dict[str, float]
    delta_held: dict[str, float]


def certify(
    folder: OrderFolder, *, order: MergeOrder, base: Shards, merged: Path, placed: dict[str, str]
) -> Certificate:
    """Measure a Merge.

    Args:
        folder: Folder of the order, told how far it is.
        order: What was asked for.
        base: Shards of the base.
        merged: Folder of the merged model, all files written.
        placed: Tensor of the base that each layer of the Adapter changes.

    Returns:
        The Certificate, which may say that the Merge fails.

    Raises:
        EngineError: A folder cannot be read or loaded at all.
    """
    tell_stage(folder, "comparing", "every tensor, as re-read from the disk", 0.5)
    written = find_shards(merged)
    changed = changed_tensors(base, written)
    tell_stage(folder, "asking", "base and Adapter", 0.65)
    prompts = _prompts(load_tokenizer(merged))
    before = _ask_adapter(order, base, written, placed, prompts)
    tell_stage(folder, "asking", "the merged model", 0.8)
    checks = _ask_merged(written, prompts, before)
    tell_stage(folder, "hashing", "every file", 0.9)
    first = next(iter(placed.values()))
    return Certificate(
        base_model=order.model.id,
        base_revision=_commit(base.folder) or order.model.revision,
        adapter_sha256=sha256(Path(order.adapter) / WEIGHTS),
        dtype=str(written.read(first).dtype).removeprefix("torch."),
        targeted_tensors=tuple(sorted(placed.values())),
        changed_tensors=changed,
        delta_kept=before.delta_kept,
        delta_held=before.delta_held,
        num_tensors=len(written.file_of),
        files={
            str(path.relative_to(merged)): sha256(path)
            for path in sorted(merged.rglob("*"))
            if path.is_file()
        },
        prompts=checks,
        versions={"python": python_version(), **{name: version(name) for name in PACKAGES}},
    )


def changed_tensors(base: Shards, written: Shards) -> tuple[str, ...]:
    """Compare two models bit for bit, shard by shard.

    Returns:
        Names of the tensors that differ, that only one of the two has, or that moved to another
        shard.
    """
    changed = {key for key, _name in base.file_of.items() ^ written.file_of.items()}
    for name in base.files:
        same_place = [key for key in base.keys(name) if key not in changed]
        if same_place:
            with open_shard(base.folder / name) as one, open_shard(written.folder / name) as other:
                changed.update(
                    key
                    for key in same_place
                    if not same_bits(one.get_tensor(key), other.get_tensor(key))
                )
    return tuple(sorted(changed))


def changes_carried(
    model: PeftModel, base: Shards, written: Shards, placed: dict[str, str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Compare what each tensor carries with what the Adapter means.

    Args:
        model: Base with Adapter.
        base: Shards of the base.
        written: Shards of the merge.
        placed: Tensor of the base that each layer of the Adapter changes.

    Returns:
        delta_kept and delta_held of a Certificate, by tensor.
    """
    kept: dict[str, float] = {}
    held: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            key = placed[name.removeprefix(_PEFT_PREFIX)]
            meant = module.get_delta_weight(module.active_adapters[0]).detach()
            meant = meant.to("cpu", torch.float32)
            before = base.read(key)
            rounded = (before.float() + meant).to(before.dtype).double() - before.double()
            done = written.read(key).double() - before.double()
            kept[key] = _share(done, rounded)
            held[key] = _share(rounded, meant.double())
    return kept, held


def _share(done: torch.Tensor, meant: torch.Tensor) -> float:
    """Return how much of one change another one is: <done, meant> / <meant, meant>."""
    size = meant.flatten().dot(meant.flatten()).item()
    # A change of nothing is carried in full; that a targeted tensor did not change is a failure
    # of its own.
    return done.flatten().dot(meant.flatten()).item() / size if size else 1.0


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


def _ask_adapter(
    order: MergeOrder, base: Shards, written: Shards, placed: dict[str, str], prompts: Prompts
) -> Before:
    loaded = load_base(base.folder, method="lora", device=_roomy_device(base))
    model = load_adapter(loaded, Path(order.adapter))
    kept, held = changes_carried(model, base, written, placed)
    logits = {label: _logits(model, ids) for label, ids in prompts.items()}
    effect_kl = {}
    with model.disable_adapter():
        for label, ids in prompts.items():
            effect_kl[label] = compare(logits[label], _logits(model, ids))[0]
    del loaded, model
    _free_memory()
    return Before(logits=logits, effect_kl=effect_kl, delta_kept=kept, delta_held=held)


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
