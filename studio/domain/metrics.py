"""Points, Curves, and what can be told from them: progress and time left."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from pydantic import Field

from studio.domain.section import Section

LOSS = "loss"
EVAL_LOSS = "eval_loss"
LEARNING_RATE = "learning_rate"
GRAD_NORM = "grad_norm"
STEP_SECONDS = "step_seconds"
TOKENS_PER_SECOND = "tokens_per_second"


class StepRecord(Section):
    """One line of metrics.jsonl: what the engine measured at one step.

    Attributes:
        values: loss (nats per supervised token), learning_rate, grad_norm (before clipping),
            step_seconds, tokens_per_second (real tokens, no padding), supervised_tokens. A record
            of its own holds eval_loss (nats per supervised token that is never trained on), at
            step 0 before the first step and at the end of each epoch.
    """

    step: int = Field(ge=0)
    total_steps: int = Field(ge=1)
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measured value."""

    step: int
    name: str
    value: float


def time_left_seconds(
    step_seconds: Sequence[float], step: int, total_steps: int
) -> tuple[float, float] | None:
    """Estimate the time to the end as a range.

    Args:
        step_seconds: Durations of the latest steps.
        step: Steps done.
        total_steps: Steps in all.

    Returns:
        Low and high estimate in seconds: steps left times the lower and upper quartile of the
        latest durations; None when fewer than three steps were measured.
    """
    if len(step_seconds) < 3 or total_steps < step:
        return None
    ordered = sorted(step_seconds)
    half = len(ordered) // 2
    left = total_steps - step
    return left * median(ordered[: half + 1]), left * median(ordered[half:])


def thin(points: Iterable[Point], max_points: int) -> list[Point]:
    """Keep at most `max_points` points of one Curve, evenly spaced, the last one always."""
    points = list(points)
    if len(points) <= max_points:
        return points
    stride = -(-len(points) // max_points)
    return points[(len(points) - 1) % stride :: stride]
