"""What whole.py and stock.py measure: the options, the spec, the budget and the documents of steps."""

import argparse
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.chat import chat_lengths, random_examples
from benchmarks.gpu.presets import PRESETS, config_of, preset_of
from benchmarks.gpu.record import Record, arguments
from studio.domain.architecture import read_architecture
from studio.domain.budget import Budget, demand_of
from studio.domain.recompute_plan import choose_method
from studio.domain.spec import JobSpec
from workers.engine.batches import MicroBatch, collate
from workers.engine.model import Method
from workers.engine.recompute import card_bytes

FIXED_TOKENS = 4096


@dataclass(kw_only=True, slots=True)
class Run:
    """What is measured.

    Attributes:
        config: Text part of the model's config.json, at the depth that is asked for.
        method: qlora or lora.
        card: Bytes that the card had before anything was taken; None on a CPU.
        retries: How often it ran out of memory, and more layers were recomputed.
    """

    record: Record
    given: argparse.Namespace
    config: dict[str, Any]
    spec: JobSpec
    method: Method
    budget: Budget
    card: int | None
    retries: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What a row says of it."""
        return {
            "model": self.given.model,
            "tokens": self.given.tokens,
            "depth": self.budget.num_layers,
            "method": self.method,
            "recomputed": len(self.budget.recomputed),
            "lengths": self.given.lengths,
        }


def options(description: str | None) -> argparse.ArgumentParser:
    """Return the options of whole.py and stock.py."""
    parser = arguments(description)
    parser.add_argument("--model", choices=PRESETS, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="of a packed row")
    parser.add_argument("--depth", type=int, help="keep only so many layers")
    parser.add_argument("--recompute", default="auto", help="auto, all, none, or so many layers")
    parser.add_argument("--lengths", choices=("chat", "fixed", "one"), default="chat")
    parser.add_argument("--method", choices=("qlora", "lora", "auto"), help="else the Preset's")
    parser.add_argument("--experts", action="store_true", help="a LoRA on routed experts, too")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="kernel times of two more steps")
    parser.add_argument("--ungated", action="store_true", help="go on when a Proof fails")
    parser.add_argument("--trl", action="store_true", help="TRL's SFTTrainer afterwards")
    return parser


def plan(record: Record, given: argparse.Namespace) -> Run:
    """Return the spec of a run, and what the engine would hold and recompute.

    Raises:
        InputError: It does not fit the card.
    """
    if given.tiny:
        given.tokens, given.steps, given.warm_up = min(given.tokens, 96), 3, 1
    config = config_of(given.model, is_tiny=given.tiny, depth=given.depth)
    preset = preset_of(given.model, is_tiny=given.tiny)
    spec = preset.job_spec(
        {
            "data": {"max_length_tokens": given.tokens},
            "batch": {
                "micro_batch_size": 1,
                "gradient_accumulation_steps": given.accumulate,
                "packing": True,
            },
            "train": {
                "num_gpus": int(record.device.type == "cuda"),
                "recompute": given.recompute if given.recompute in ("all", "none") else "auto",
            },
            **({"method": given.method} if given.method else {}),
        }
    )
    if given.experts:
        targets = (*(target.value for target in spec.lora.targets), "routed_experts")
        lora = {"targets": targets, "expert_rank": "divided"}
        spec = JobSpec.model_validate(
            {**spec.model_dump(), "lora": {**spec.lora.model_dump(), **lora}}
        )
    card = card_bytes(record.device)
    if given.recompute.isdecimal():
        method: Method = "qlora" if spec.method == "auto" else spec.method
        demand = demand_of(config, spec.model_copy(update={"method": method}))
        budget = demand.budget(max(0, len(demand.layers.kept) - int(given.recompute)))
    else:
        choice = choose_method(config, spec, card)
        method, budget = choice.method, choice.budget
    return Run(
        record=record,
        given=given,
        config=config,
        spec=spec,
        method=method,
        budget=budget,
        card=card,
    )


def documents(run: Run, number: int) -> list[list[int]]:
    """Return the lengths of the documents of each micro-batch of a step."""
    tokens, rows = run.given.tokens, range(run.given.accumulate)
    if run.given.lengths == "chat":
        return [chat_lengths(tokens, seed=1000 * number + row) for row in rows]
    each = min(tokens, FIXED_TOKENS) if run.given.lengths == "fixed" else tokens
    return [[each] * (tokens // each) for _ in rows]


def batches_of(run: Run, number: int) -> list[MicroBatch]:
    """Return the micro-batches of a step, on the device."""
    vocabulary = read_architecture(run.config).vocabulary
    rows = [
        random_examples(lengths, vocabulary, seed=1000 * number + row)
        for row, lengths in enumerate(documents(run, number))
    ]
    return [collate(row, 0, packed=True).to(run.record.device) for row in rows]


def recompute_more(run: Run) -> bool:
    """Have more layers recomputed: half of those that were kept, then all. Returns whether any is.

    A card that runs out of memory is a finding about the budget; a figure is wanted all the same.
    """
    kept = run.budget.num_layers - len(run.budget.recomputed)
    demand = demand_of(run.config, run.spec.model_copy(update={"method": run.method}))
    run.budget = demand.budget(kept // 2 if not run.retries else 0)
    run.retries += 1
    return kept > 0
