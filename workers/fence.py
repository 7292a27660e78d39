"""Who may write into a run folder: the Lease whose mark stands in owner.txt, and nobody else.

A trainer that was given up for lost may still live, or wake up again, while another worker goes on
with its run. It looks at owner.txt whenever it is about to write what counts.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from studio.disk import RunFolder
from studio.domain.outcome import ExitCode
from studio.errors import StudioError

MARK = "STUDIO_RUN"  # table:id:epoch:owner


class FencedError(StudioError):
    """The run belongs to another Lease by now: this process writes nothing any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fence:
    """The mark of this process, and the file that says whose mark counts.

    Attributes:
        owner: owner.txt of the run folder.
        mark: Of the Lease that this process was started for; empty when it was started by hand.
    """

    owner: Path
    mark: str

    @property
    def epoch(self) -> int:
        """How often the run had been claimed when this process was started; 0 by hand."""
        parts = self.mark.split(":")
        return int(parts[2]) if len(parts) > 2 and parts[2].isdecimal() else 0

    def is_lost(self) -> bool:
        """Tell whether the run belongs to another Lease by now."""
        if not self.mark:
            return False
        try:
            owner = self.owner.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return False
        return owner not in ("", self.mark)

    def check(self) -> None:
        """Refuse to go on when the run belongs to another Lease.

        Raises:
            FencedError: It does.
        """
        if self.is_lost():
            self.refuse()

    def refuse(self) -> NoReturn:
        """Refuse to go on.

        Raises:
            FencedError: Always.
        """
        raise FencedError("Another worker has taken this run over.", code=ExitCode.FENCED)


def fence_of(run: RunFolder) -> Fence:
    """Return the fence of this process around a run folder."""
    mark = os.environ.get(MARK, "")  # what the launcher has handed over
    return Fence(owner=run.owner, mark=mark)
