"""Read a file into a canonical file: records, findings and duplicates in one pass."""

import hashlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from studio.domain.conversation import RECORD_TYPES
from studio.domain.validation import MAX_ISSUES_PER_KIND, Issue, Report
from studio.errors import InputError
from studio.intake.archive import Limits, files_of, size_of
from studio.intake.canonical import Writer, Written
from studio.intake.duplicates import Duplicates
from studio.intake.formats import Mapping
from studio.intake.read import Progress, Reader

# What is left for the search of duplicates, of a whole that is 1.
_READ_SHARE = 0.85


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What a file became.

    Attributes:
        written: The good records; None when there are none.
        rejects: The bad records as JSON lines; None when there are none.
    """

    report: Report
    written: Written | None
    rejects: Path | None


def take_file(
    path: Path,
    folder: Path,
    *,
    limits: Limits,
    mapping: Mapping | None,
    progress: Progress,
    name: str = "",
) -> Taken:
    """Read a file and write its good records, in the order of the file.

    Args:
        path: The file.
        folder: An empty folder, which the caller removes.
        limits: How much the file may unfold to.
        mapping: What the columns of a table are.
        progress: Called with the share that is done, 0 to 1.
        name: What the file was called where it came from, if it has another name here.

    Raises:
        InputError: The file cannot be read.
        OSError: The folder cannot be written.
    """
    places = Places()
    rejects = folder / "rejects.jsonl"
    with Writer(folder) as writer, rejects.open("wb") as bad:
        reader = Reader(limits, mapping, bad)
        for record in reader.read(path, lambda share: progress(share * _READ_SHARE), name):
            writer.add(record)
            places.add(*reader.place)
        report = reader.report()
        written = None
        if report.num_conversations:
            written = writer.finish(RECORD_TYPES[report.kind])
            report = with_duplicates(report, written.duplicates, places.at)
    progress(1.0)
    return Taken(report=report, written=written, rejects=rejects if report.num_rejected else None)


def checked_size(path: Path, limit: int) -> int:
    """Return the size of a file; 0 when it cannot be told, which its reader explains.

    Raises:
        InputError: It is larger than the limit.
    """
    try:
        size = size_of(path)
    except (OSError, ValueError):
        return 0
    if size > limit:
        raise InputError(
            f"The file {path.name} has {size / 2**20:.0f} MiB, more than the {limit / 2**20:.0f} "
            "MiB that one file may have.",
            "Split it, or raise STUDIO_MAX_UPLOAD_BYTES.",
        )
    return size


def sha256_of(path: Path) -> str:
    """Return the hash of a file's bytes; of a folder, of the hashes and names of its files."""
    if path.is_dir():
        lines = "".join(f"{sha256_of(file)}  {file.name}\n" for file in files_of(path))
        return hashlib.sha256(lines.encode("utf-8", errors="surrogateescape")).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Places:
    """File and line of each record; four bytes a record."""

    def __init__(self) -> None:
        self._lines = array("L")
        self._starts: list[int] = []
        self._files: list[str] = []

    def add(self, file: str, line: int) -> None:
        """Note where the next record stands."""
        if not self._files or self._files[-1] != file:
            self._starts.append(len(self._lines))
            self._files.append(file)
        self._lines.append(line)

    def at(self, number: int) -> tuple[str, int]:
        """Return file and line of a record."""
        return self._files[bisect_right(self._starts, number) - 1], self._lines[number]


def with_duplicates(
    report: Report, found: Duplicates, place: Callable[[int], tuple[str, int]]
) -> Report:
    """Add what is equal and nearly equal to a Report.

    Args:
        report: The Report of the same records.
        found: Their duplicates.
        place: Returns file and line of a record.
    """
    issues = [*report.issues]
    for kind, words, pairs in (
        ("duplicate", "the same conversation as", found.exact),
        ("near_duplicate", "nearly the same conversation as", found.near),
    ):
        for number, first in pairs[:MAX_ISSUES_PER_KIND].tolist():
            file, line = place(number)
            other_file, other_line = place(first)
            where = f"line {other_line}" + (f" of {other_file}" if other_file != file else "")
            issues.append(
                Issue(
                    line=line, file=file, kind=kind, reason=f"{words} {where}", severity="warning"
                )
            )
    if not found.is_complete:
        reason = (
            "too many conversations are alike to compare them all; near-duplicates may be missing"
        )
        issues.append(Issue(line=0, kind="near_duplicate", reason=reason, severity="note"))
    numbers = {"duplicate": len(found.exact), "near_duplicate": len(found.near)}
    counts = Counter(report.counts) + Counter(numbers)
    return report.model_copy(
        update={
            "issues": tuple(issues),
            "counts": dict(counts),
            "num_near_duplicates": len(found.near),
            "num_warnings": report.num_warnings + sum(numbers.values()),
        }
    )
