"""One training run, top to bottom: build, loop, step, stop.

Reads spec.json and dataset.jsonl of a run folder, writes all its other files.
Not covered: more than one card, packing, resuming (load_checkpoint is there, no field asks for it).
"""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from studio.disk import RunFolder
from studio.domain import metrics
from studio.domain.proof import Proof
from studio.domain.spec import JobSpec, parse_spec
from studio.errors import EngineError, InputError
from workers.engine.batches import Example, count_steps, micro_batches, read_examples, step_order
from workers.engine.checkpoint import save_adapter, save_checkpoint
from workers.engine.loss import supervised_loss
from workers.engine.model import add_adapter, find_base, load_base, load_tokenizer
from workers.engine.optim import build_optimizer, learning_rate_at, set_learning_rate
from workers.engine.proofs import (
    prove_coverage,
    prove_learned,
    prove_loss,
    prove_mask,
    prove_targets,
)
from workers.engine.report import Reporter

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Training:
    """All that the acts share.

    Attributes:
        losses: Loss of each step so far: also how many steps are done.
    """

    folder: RunFolder
    spec: JobSpec
    report: Reporter
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    model: PeftModel
    optimizer: torch.optim.Optimizer
    total_steps: int
    proofs: list[Proof]
    losses: list[float] = field(default_factory=list)


def train(folder: RunFolder) -> None:
    """Train as the run folder's spec.json says.

    Raises:
        InputError: The spec, the dataset or the model is wrong.
        EngineError: The run cannot go on; the message says why.
        MachineError: The disk is full or read-only.
    """
    report = Reporter(folder)
    report.begin()
    training = build(folder, report)
    with _stop_wish() as wish:
        loop(training, wish)
    stop(training)


@dataclass(slots=True)
class StopWish:
    """Whether somebody asked the run to stop."""

    is_there: bool = False


@contextmanager
def _stop_wish() -> Iterator[StopWish]:
    """Turn SIGTERM into a wish that the loop reads between steps."""
    wish = StopWish()

    def note(_signal: int, _frame: FrameType | None) -> None:
        wish.is_there = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGTERM, before)
