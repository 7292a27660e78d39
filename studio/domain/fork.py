"""What a new Run may take over from a Checkpoint of another one."""

import math
from enum import StrEnum

from studio.domain.spec import JobSpec
from studio.domain.spec_diff import diff
from studio.errors import InputError


class Keep(StrEnum):
    """What a fork takes from the Checkpoint that it begins from."""

    EVERYTHING = "everything"
    WEIGHTS = "weights"


KEEP_WORDS = {
    Keep.EVERYTHING: "weights, optimizer and data order go on",
    Keep.WEIGHTS: "only the weights go on; steps and optimizer begin anew",
}
# Other weights train under another value of these, so those of the Checkpoint do not fit.
_OF_THE_MODEL = frozenset({"model.id", "model.revision", "method"})
_OF_THE_ADAPTER = frozenset(
    {"lora.rank", "lora.targets", "lora.modules", "lora.expert_rank", "lora.dora"}
)
# What the number of steps of an epoch depends on, beside the whole data section.
_OF_THE_STEPS = frozenset({"train.num_gpus", "train.num_nodes"})


def check_same(before: JobSpec, after: JobSpec) -> None:
    """See that what a Checkpoint holds fits a new Run.

    Args:
        before: Spec of the Run that the Checkpoint is of.
        after: Spec of the new one.

    Raises:
        InputError: A field has a value with which it cannot go on; all such are named.
    """
    fixed = _OF_THE_MODEL
    if before.method != "full":
        fixed |= _OF_THE_ADAPTER
    wrong = [change for change in diff(before, after) if change.key in fixed]
    if wrong:
        words = "; ".join(f"{one.title} was {one.old}, now {one.new}" for one in wrong)
        raise InputError(
            f"A fork cannot change what its checkpoint is made of: {words}.",
            "Put that back, or launch a new run.",
            field=wrong[0].key,
        )


def check_steps(before: JobSpec, after: JobSpec, step: int, total_steps: int | None) -> None:
    """See that a new Run that goes on with everything has a step to take.

    Args:
        before: Spec of the Run that the Checkpoint is of.
        after: Spec of the new one, both with their Datasets named in the same way.
        step: Steps that the Checkpoint has done.
        total_steps: Steps of the first Run in all; None where it does not know them yet.

    Raises:
        InputError: All its steps are done.
    """
    most = _steps_of(before, after, total_steps)
    if most is not None and most <= step:
        raise InputError(
            f"Nothing is left to train: step {step} is done, and the run has {most} steps.",
            "Give it more epochs or most steps, or take only the weights.",
            field="train.epochs" if after.train.max_steps is None else "train.max_steps",
        )


def _steps_of(before: JobSpec, after: JobSpec, total_steps: int | None) -> int | None:
    """Return the most steps that the new Run can have; None where only its start can tell."""
    limit = after.train.max_steps
    changed = {change.key for change in diff(before, after)}
    moved = any(key.startswith(("data.", "batch.")) or key in _OF_THE_STEPS for key in changed)
    is_cut = before.train.max_steps is not None and before.train.max_steps == total_steps
    if total_steps is None or moved or (is_cut and changed & {"train.epochs", "train.max_steps"}):
        return limit
    steps = math.ceil(total_steps * after.train.epochs / before.train.epochs - 1e-9)
    return steps if limit is None else min(steps, limit)
