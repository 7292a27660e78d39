"""Tail metrics.jsonl of a live Run into Points."""

import logging
from pathlib import Path

from pydantic import ValidationError

from studio.domain.metrics import Point, StepRecord

logger = logging.getLogger(__name__)


class Follower:
    """Reads the whole lines that were added to a file since the last call.

    Args:
        path: The file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[StepRecord]:
        """Return the new records; half a line is left for the next call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            chunk = file.read()
        whole, newline, _ = chunk.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        records = []
        for line in whole.splitlines():
            try:
                records.append(StepRecord.model_validate_json(line))
            except ValidationError as error:
                logger.error("%s holds a line that is no record: %s", self._path, error)
        return records


def points(records: list[StepRecord]) -> list[Point]:
    """Return the Points of some records."""
    return [
        Point(step=record.step, name=name, value=value)
        for record in records
        for name, value in record.values.items()
    ]
