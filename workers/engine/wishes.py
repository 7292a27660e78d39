"""What is asked of a run between two steps, and how all its ranks agree on it."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from studio.disk import RunFolder
from workers.engine.world import World
from workers.fence import fence_of


@dataclass(slots=True)
class StopWish:
    """Whether somebody asked the run to stop."""

    is_there: bool = False


@contextmanager
def stop_wish() -> Iterator[StopWish]:
    """Turn SIGTERM into a wish that the loop reads between steps."""
    wish = StopWish()

    def note(_signal: int, _frame: FrameType | None) -> None:
        wish.is_there = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreed:
    """What all ranks do behind a step."""

    stop: bool
    save: bool
    evaluate: bool
    save_is_due: bool


class Wishes:
    """The wishes of one process of a run.

    Rank 0 reads what others write into the run folder; what it finds reaches all ranks with the one
    exchange a step in which they also agree to stop.

    Args:
        run: The run folder.
        world: The processes of the run.
        stop: Of this process.
    """

    def __init__(self, run: RunFolder, world: World, stop: StopWish) -> None:
        self._run, self._world, self._stop = run, world, stop
        self._fence = fence_of(run)
        self._done = {"saves": 0, "evaluations": 0}

    def agree(self, *, save_is_due: bool) -> Agreed:
        """Ask what is to be done now, between two steps; all ranks call it.

        Args:
            save_is_due: Whether the time since the latest Checkpoint is up; rank 0 is heard.

        Raises:
            FencedError: Another worker has taken the run over; on all ranks.
        """
        stop, save, evaluate, is_lost = self._stop.is_there, False, False, False
        if self._world.is_main:
            is_lost = self._fence.is_lost()
            asked = self._asked()
            save, evaluate = (asked[name] > self._done[name] for name in ("saves", "evaluations"))
            self._done = asked
        else:
            save_is_due = False
        stop, save, evaluate, save_is_due, is_lost = self._world.vote(
            stop, save, evaluate, save_is_due, is_lost
        )
        if is_lost:
            self._fence.refuse()
        return Agreed(stop=stop, save=save, evaluate=evaluate, save_is_due=save_is_due)

    def _asked(self) -> dict[str, int]:
        """Return how often each was asked for since the run was started."""
        try:
            asked = json.loads(self._run.wishes.read_text(encoding="utf-8"))
            return {name: max(done, int(asked[name])) for name, done in self._done.items()}
        # Mostly there is no such file; and training is worth more than a wish that cannot be read.
        except (OSError, ValueError, KeyError, TypeError):
            return self._done
