"""TRL's SFTTrainer on the model and the documents of whole.py: the stock way, in its own process.

    python -m benchmarks.gpu.stock --model 80b [the options of whole.py]

The same random weights in the same 4 bits; routed experts through bitsandbytes' parametrisation and
transformers' grouped_mm; PEFT's own LoRA on the same layers; the same optimizer. The kernels are
tried first, as for us, so that fla's refusal is lifted for both. Differences that are the tool's:
documents are padded, not packed (without FlashAttention TRL's packing lets them see each other), as
many in a micro-batch as make about the same tokens; all layers are recomputed, or none with
--recompute none. Tokens a second count real ones. Where the model does not fit, it is tried again
with half of the layers: the row says how many, and whole.py --depth gives ours beside it.
"""

import argparse
import contextlib
import importlib
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from benchmarks.gpu.chat import MEAN_TOKENS, random_examples
from benchmarks.gpu.clock import Times, watched_card
from benchmarks.gpu.plan import Run, documents, options, plan
from benchmarks.gpu.random_base import build_base
from benchmarks.gpu.record import OUT_OF_MEMORY, Record, checked
from benchmarks.gpu.whole import GIB, peaks, settle
from studio.domain.architecture import read_architecture
from studio.errors import StudioError
from studio.tokens.examples import Example
from workers.engine.batches import IGNORED
from workers.engine.kernels import preflight
from workers.engine.lora import adapter_config
from workers.engine.quantize import nf4_states

LEAST_DEPTH = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Measure TRL at the depth that fits; return 1 only when our own part breaks."""
    given = checked(options(__doc__), argv)
    record = Record("stock", given)
    if importlib.util.find_spec("trl") is None:
        record.row("TRL is not installed", model=given.model)
        return 0
    depth: int | None = given.depth
    while True:
        given.depth = depth
        try:
            run = plan(record, given)
        except StudioError:
            # Our budget does not bind it: all layers recomputed is the least.
            run = plan(record, argparse.Namespace(**{**vars(given), "recompute": "999999"}))
        depth = run.budget.num_layers
        broke = record.attempt("TRL", partial(measure, run), **run.settings)
        if broke != OUT_OF_MEMORY or depth <= LEAST_DEPTH:
            return 0
        depth = max(LEAST_DEPTH, depth // 2)


class Watch(TrainerCallback):
    """Takes the time of each step."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device, self._start = device, 0.0

    def on_step_begin(self, *_given: Any, **_named: Any) -> None:
        """Begin a step."""
        self._start = self._now()

    def on_step_end(self, *_given: Any, **_named: Any) -> None:
        """End a step, the optimizer's part too."""
        self.seconds.append(self._now() - self._start)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def measure(run: Run) -> None:
    """Build the model, train it for some steps, and say what they took."""
    record, device, given = run.record, run.record.device, run.given
    preflight(device)
    torch.manual_seed(run.spec.train.seed)
    base = build_base(run.config, run.method, device)
    adapter = adapter_config(base, run.spec.lora)
    parametrise_experts(base)
    settle(device)
    examples, rows = chosen(run)
    watch = Watch(device)
    with tempfile.TemporaryDirectory() as folder, watched_card(device) as card:
        trainer = _trainer(run, base, adapter, _dataset(examples), rows, folder)
        trainer.add_callback(watch)
        # TRL prints its own figures; the table is ours.
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    allocated, reserved = peaks(device)
    seconds = watch.seconds[given.warm_up :]
    real = [
        sum(len(example.tokens) for example in examples[place : place + rows * given.accumulate])
        for place in range(0, len(examples), rows * given.accumulate)
    ][given.warm_up :]
    rate = statistics.median(t / s for t, s in zip(real, seconds, strict=True))
    times = Times.of([1000 * each for each in seconds])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    record.row(
        "TRL", **run.settings,
        step_s=times.median / 1000 if record.is_timed else None,
        tokens_per_s=rate if record.is_timed else None,
        allocated_gib=allocated, reserved_gib=reserved, budget_gib=run.budget.total_bytes / GIB,
        trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        more=[{
            "all_s": seconds if record.is_timed else None, "real_tokens": real,
            "examples_of_a_row": rows, "losses": losses, "card": card.said,
            "optim": str(trainer.args.optim),
        }],
    )  # fmt: skip


def parametrise_experts(base: PreTrainedModel) -> None:
    """Hand routed experts to transformers, their 4 bits to bitsandbytes' parametrisation."""
    if getattr(base.config, "num_experts", 0):
        base.set_experts_implementation("grouped_mm")
    for module in list(base.modules()):
        for name, state in nf4_states(module).items():
            values = state.as_dict(packed=True)
            replace_parameter_4bit_prequantized(module, name, values, base.device)
        vars(module).pop("nf4_states", None)


def chosen(run: Run) -> tuple[list[Example], int]:
    """Return the documents of all steps, and how many make a padded micro-batch."""
    given, vocabulary = run.given, read_architecture(run.config).vocabulary
    steps = range(1, given.warm_up + given.steps + 1)
    if given.lengths == "chat":
        rows = max(1, round(given.tokens / min(MEAN_TOKENS, given.tokens / 6)))
    else:
        rows = len(documents(run, 1)[0])
    lengths = [length for number in steps for row in documents(run, number) for length in row]
    lengths = (lengths * 2)[: rows * given.accumulate * len(steps)]
    return random_examples(lengths, vocabulary, seed=1), rows


def _dataset(examples: Sequence[Example]) -> Any:
    datasets: Any = importlib.import_module("datasets")
    labels = [
        [int(t) if m else IGNORED for t, m in zip(e.tokens, e.mask, strict=True)] for e in examples
    ]
    tokens = [[int(t) for t in example.tokens] for example in examples]
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": labels})


def _trainer(
    run: Run, base: PreTrainedModel, adapter: Any, dataset: Any, rows: int, folder: str
) -> Any:
    trl: Any = importlib.import_module("trl")
    is_cpu = run.record.device.type == "cpu"
    name = run.spec.optim.optimizer
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(WordLevel({"[pad]": 0}, unk_token="[pad]")),
        pad_token="[pad]",
        eos_token="[pad]",
    )
    settings = trl.SFTConfig(
        output_dir=folder,
        max_steps=run.given.warm_up + run.given.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=run.given.accumulate,
        gradient_checkpointing=run.given.recompute != "none",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        train_sampling_strategy="sequential",
        optim="adamw_torch" if name == "adamw" else name,
        learning_rate=run.spec.optim.learning_rate,
        bf16=not is_cpu,
        use_cpu=is_cpu,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return trl.SFTTrainer(
        model=base,
        args=settings,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=adapter,
    )


if __name__ == "__main__":
    sys.exit(main())
