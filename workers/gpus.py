"""Inventory of the GPUs of this machine, from nvidia-smi: no CUDA in this process.

`python -m workers.gpus` prints it as JSON, for `studio doctor`.
"""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass

logger = logging.getLogger(__name__)

_QUERY = "index,uuid,name,memory.total,memory.used"
_ANSWER_SECONDS = 8  # less than a third of a Lease


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One card; its memory is None where the driver does not tell."""

    index: int
    uuid: str
    name: str
    total_gib: float | None
    used_gib: float | None

    @property
    def free_gib(self) -> float | None:
        """Memory that nobody uses."""
        if self.total_gib is None or self.used_gib is None:
            return None
        return self.total_gib - self.used_gib


def inventory() -> list[Gpu]:
    """Return the cards; empty when there is no NVIDIA driver or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError as error:
        logger.warning("nvidia-smi does not start: %s", error)
        return []
    try:
        answer, _ = process.communicate(timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        # Not waited for: after a fault of a card it may hang where no signal reaches it.
        process.kill()
        logger.warning("nvidia-smi does not answer: %s", error)
        return []
    return parse(answer) if process.returncode == 0 else []


def parse(text: str) -> list[Gpu]:
    """Parse nvidia-smi's CSV; memory comes in MiB, or as [N/A] where it is the machine's own.

    A card that has fallen off the bus is told in other words than a line of values; it is left out.
    """
    cards = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != len(_QUERY.split(",")) or not parts[0].isdecimal():
            logger.warning("nvidia-smi says: %s", line)
            continue
        index, uuid, name, total, used = parts
        cards.append(
            Gpu(index=int(index), uuid=uuid, name=name, total_gib=_gib(total), used_gib=_gib(used))
        )
    return cards


def _gib(mib: str) -> float | None:
    return float(mib) / 1024 if mib.replace(".", "", 1).isdecimal() else None


if __name__ == "__main__":
    sys.stdout.write(json.dumps([asdict(card) for card in inventory()]) + "\n")
