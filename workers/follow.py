"""Tail the files of a live Run: metrics.jsonl into Points, events.jsonl into its history."""

import logging
import os
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from studio.domain.metrics import Point, StepRecord
from studio.domain.section import Section

logger = logging.getLogger(__name__)

_Record = TypeVar("_Record", bound=BaseModel)


class Event(Section):
    """One line of events.jsonl: what the engine says has happened.

    Attributes:
        at: Seconds since 1970.
        epoch: Of the Lease that it happened under.
        kind: "began", "saved", "evaluated", "passed over".
        step: Steps done then, where that means anything.
        text: A sentence for a person.
    """

    at: float
    epoch: int
    kind: str
    step: int | None = None
    text: str


class Tail(Generic[_Record]):
    """Reads the whole lines that were added to a file since the last call.

    Args:
        path: The file; it may not exist yet.
        kind: What a line is.
    """

    def __init__(self, path: Path, kind: type[_Record]) -> None:
        self._path = path
        self._kind = kind
        self._offset = 0
        self._inode = 0

    def read(self) -> list[_Record]:
        """Return the new records; half a line is left for the next call.

        A file that was written anew, as a Run that goes on from a Checkpoint does, is read anew.
        """
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            chunk = file.read()
        whole, newline, _ = chunk.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        records = []
        for line in whole.splitlines():
            try:
                records.append(self._kind.model_validate_json(line))
            except ValidationError as error:
                logger.error("%s holds a line that is no record: %s", self._path, error)
        return records


class Follower(Tail[StepRecord]):
    """Reads metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, StepRecord)


def points(records: list[StepRecord]) -> list[Point]:
    """Return the Points of some records."""
    return [
        Point(step=record.step, name=name, value=value)
        for record in records
        for name, value in record.values.items()
    ]
