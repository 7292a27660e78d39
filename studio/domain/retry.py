"""Whether the studio itself tries again what did not end well: bounded, and never in a circle."""

from dataclasses import dataclass

# A crash is the work's own: once more may help, twice at the same place will not.
MAX_CRASHES = 1
# A worker that is lost is seldom the work's fault, unless the work takes the machine down.
MAX_LOSSES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempts:
    """How often a row was tried without getting any further.

    Attributes:
        crashes: Ends of its process that nobody wished.
        losses: Workers that were gone.
        furthest: The most steps that any attempt had done when it ended so.
    """

    crashes: int = 0
    losses: int = 0
    furthest: int = 0


def after_crash(before: Attempts, step: int) -> Attempts | None:
    """Return what to keep when the work is tried again; None when it has failed.

    Args:
        before: What was kept until now.
        step: Steps done when it crashed; one that got further than ever counts anew.
    """
    count = 1 if step > before.furthest else before.crashes + 1
    if count > MAX_CRASHES:
        return None
    losses = 0 if step > before.furthest else before.losses
    return Attempts(crashes=count, losses=losses, furthest=max(step, before.furthest))


def after_loss(before: Attempts, step: int) -> Attempts | None:
    """Return what to keep when the work of a lost worker is tried again; None when it has failed.

    Args:
        before: What was kept until now.
        step: Steps done when the worker was lost.
    """
    count = 1 if step > before.furthest else before.losses + 1
    if count > MAX_LOSSES:
        return None
    crashes = 0 if step > before.furthest else before.crashes
    return Attempts(crashes=crashes, losses=count, furthest=max(step, before.furthest))
