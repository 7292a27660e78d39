"""What a Run has written so far, read for the page and the command line."""

from pathlib import Path

from studio.domain.proof import Proofs, Recall
from studio.domain.sample import Sample
from studio.services import shared
from studio.services.studio import Studio

LOG_TAIL_BYTES = 64 * 1024


def log_tail(studio: Studio, run_id: int) -> str:
    """Return the end of a Run's log without control characters; empty when there is none yet."""
    shared.fetch_reports(studio, run_id)
    return read_tail(studio.home.run(run_id).log)


def read_tail(path: Path) -> str:
    """Return the last 64 KiB of a text file without control characters."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    return "".join(c for c in text if c == "\n" or c == "\t" or c.isprintable())


def proofs(studio: Studio, run_id: int) -> Proofs:
    """Return the Proofs measured so far."""
    shared.fetch_reports(studio, run_id)
    path = studio.home.run(run_id).proofs
    if not path.exists():
        return Proofs()
    return Proofs.model_validate_json(path.read_text(encoding="utf-8"))


def recall(studio: Studio, run_id: int) -> Recall | None:
    """Return the answers to the example questions, when they were asked."""
    shared.fetch_reports(studio, run_id)
    path = studio.home.run(run_id).recall
    if not path.exists():
        return None
    return Recall.model_validate_json(path.read_text(encoding="utf-8"))


def samples(studio: Studio, run_id: int) -> list[Sample]:
    """Return what the model said to the sample prompts so far, in the order of the steps."""
    shared.fetch_reports(studio, run_id)
    path = studio.home.run(run_id).samples
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [Sample.model_validate_json(line) for line in whole.splitlines()]
