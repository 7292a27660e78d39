"""Read a file of any layout and format as records, and report what is wrong, with line numbers."""

import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from studio.domain.conversation import Kind, Record
from studio.domain.validation import Issue, Report
from studio.errors import InputError
from studio.intake.archive import Limits, Part, files_of, open_parts, size_of
from studio.intake.findings import Findings
from studio.intake.formats import Mapping, UnknownFormatError
from studio.intake.parts import PartReader

Progress = Callable[[float], None]


def no_progress(_: float) -> None:
    """Report to nobody."""


class Reader:
    """Reads records of one file and keeps what makes the Report.

    Args:
        limits: How much the file may unfold to.
        mapping: What the columns mean, where somebody said so.
        keep_rejects: Takes one JSON object a line for each record that is left out: line, file,
            text (its first 64 KiB) and findings.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        mapping: Mapping | None = None,
        keep_rejects: BinaryIO | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._mapping = mapping
        self._findings = Findings(keep_rejects)
        self._titles: list[str] = []
        self._kind: Kind | None = None
        self._columns: tuple[str, ...] = ()

    def read(
        self, path: Path, progress: Progress = no_progress, name: str = ""
    ) -> Iterator[Record]:
        """Yield each good record; whatever else is in the file goes to the Report.

        Args:
            path: The file.
            progress: Called with the share of the file that was read, 0 to 1.
            name: What the file was called where it came from, if it has another name here.

        Raises:
            InputError: The file does not exist or cannot be opened.
        """
        for file in files_of(path):
            open_dataset(file).close()
        size = max(size_of(path), 1)
        part: Part | None = None
        before = 0
        try:
            for part in open_parts(path, limits=self._limits, name=name, skip=self._skip):
                step = partial(_tell, progress, before, size)
                yield from self._read_part(part, step)
                before += _end_of(part, path)
        except InputError as error:
            if isinstance(error, UnknownFormatError):
                self._columns = error.columns
            self._findings.add_to_file("file", str(error), part.name if part else "")
        self._findings.close()
        progress(1.0)

    def _read_part(self, part: Part, step: Callable[[int], None]) -> Iterator[Record]:
        reader = PartReader(part, self._findings, self._mapping)
        try:
            for record in reader.read(lambda: step(part.file.tell())):
                if reader.kind != self._kind:
                    self._kind = self._kind or reader.kind
                    self._refuse_other(reader.kind)
                yield record
        finally:
            if reader.title and reader.title not in self._titles:
                self._titles.append(reader.title)

    @property
    def place(self) -> tuple[str, int]:
        """File (empty but in an archive) and line of the record that was yielded last."""
        return self._findings.place

    def _skip(self, file: str) -> None:
        reason = "the file is not read: it is a note or a picture beside the data"
        self._findings.add(Issue(line=0, kind="skipped", file=file, reason=reason, severity="note"))

    def _refuse_other(self, kind: Kind | None) -> None:
        if kind != self._kind:
            raise InputError(
                f"The file holds {kind}, but those before it in the archive {self._kind}.",
                "Upload each kind by itself.",
            )

    def report(self) -> Report:
        """Return the Report of what was read so far."""
        return self._findings.report(
            kind=self._kind or Kind.CONVERSATIONS,
            title="; ".join(self._titles),
            columns=self._columns,
        )


def check_file(
    path: Path,
    limits: Limits | None = None,
    mapping: Mapping | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Read a whole file and report.

    Args:
        path: The file.
        limits: How much it may unfold to.
        mapping: What the columns mean, where somebody said so.
        progress: Called with the share of the file that was read, 0 to 1.

    Raises:
        InputError: The file does not exist or cannot be opened.
    """
    reader = Reader(limits, mapping)
    for _ in reader.read(path, progress):
        continue
    return reader.report()


def _tell(progress: Progress, before: int, size: int, at: int) -> None:
    progress(min(1.0, (before + at) / size))


def _end_of(part: Part, path: Path) -> int:
    """Return what a finished file of a folder adds to the way; members of a zip share one file."""
    return os.fstat(part.file.fileno()).st_size if path.is_dir() else 0


def open_dataset(path: Path) -> BinaryIO:
    """Open a file of records.

    Raises:
        InputError: It does not exist, is a folder, or cannot be read.
    """
    try:
        # Asked first: opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is not a file.", "Give the path of a data file.")
        return path.open("rb")
    except OSError as error:
        raise InputError(
            f"The file {path} cannot be read: {(error.strerror or str(error)).lower()}.",
            "Give the path of a data file.",
        ) from error
