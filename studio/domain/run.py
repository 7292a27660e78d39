"""States of a Run and the moves between them; Merges and Chats use the same words."""

from enum import StrEnum


class RunState(StrEnum):
    """Where a Run, a Merge or a Chat stands in its life."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FINISHED = "FINISHED"
    FAILED = "FAILED"

    @property
    def is_final(self) -> bool:
        """Whether nothing follows unless somebody resumes it."""
        return self in FINAL

    @property
    def is_live(self) -> bool:
        """Whether a worker holds it."""
        return self in LIVE


class Wish(StrEnum):
    """What a user wants of a row that is STOPPING.

    A paused Run goes back into the queue and is held there: it has no state of its own.
    """

    NONE = ""
    STOP = "stop"
    PAUSE = "pause"


LIVE = frozenset({RunState.RUNNING, RunState.STOPPING})
FINAL = frozenset({RunState.STOPPED, RunState.FINISHED, RunState.FAILED})

MOVES: dict[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.RUNNING, RunState.STOPPED}),
    # Back into the queue: its worker was lost or closed, or it crashed and is tried again.
    RunState.RUNNING: frozenset(
        {RunState.STOPPING, RunState.FINISHED, RunState.FAILED, RunState.QUEUED}
    ),
    # A run may finish or fail while the wish to stop travels to it; a pause leads to the queue.
    RunState.STOPPING: frozenset(
        {RunState.STOPPED, RunState.FINISHED, RunState.FAILED, RunState.QUEUED}
    ),
    # Resumed from its latest Checkpoint; what is finished has nothing left to do.
    RunState.STOPPED: frozenset({RunState.QUEUED}),
    RunState.FAILED: frozenset({RunState.QUEUED}),
    RunState.FINISHED: frozenset(),
}


def sources(target: RunState) -> frozenset[RunState]:
    """Return the states from which a move to `target` is allowed."""
    return frozenset(state for state, targets in MOVES.items() if target in targets)
