"""Inventory of the GPUs of this machine, from nvidia-smi: no CUDA in this process.

`python -m workers.gpus` prints it as JSON, for `studio doctor`.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass

_QUERY = "index,name,memory.total,memory.used"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One card; its memory is None where the driver does not tell."""

    index: int
    name: str
    total_gib: float | None
    used_gib: float | None


def inventory() -> list[Gpu]:
    """Return the cards; empty when there is no NVIDIA driver or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    answer = subprocess.run(
        [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return parse(answer.stdout) if answer.returncode == 0 else []


def parse(text: str) -> list[Gpu]:
    """Parse nvidia-smi's CSV; memory comes in MiB, or as [N/A] where it is the machine's own."""
    cards = []
    for line in text.splitlines():
        index, name, total, used = (part.strip() for part in line.split(","))
        cards.append(
            Gpu(
                index=int(index),
                name=name,
                total_gib=_gib(total),
                used_gib=_gib(used),
            )
        )
    return cards


def _gib(mib: str) -> float | None:
    return float(mib) / 1024 if mib.replace(".", "", 1).isdecimal() else None


if __name__ == "__main__":
    sys.stdout.write(json.dumps([asdict(card) for card in inventory()]) + "\n")
