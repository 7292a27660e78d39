"""One training run as a process.

    torchrun --standalone --nproc-per-node=1 -m workers.engine RUN_DIR
    python -m workers.engine RUN_DIR

RUN_DIR holds spec.json and dataset.jsonl (studio/disk.py). Exit code 0: see result.json, which
says FINISHED or STOPPED; 76: another worker has taken the run over, nothing was said; otherwise see
error.json (codes: studio.domain.outcome). Not covered: restarts; a run that was cut off goes on
from its latest Checkpoint when it is started again.
"""

import argparse
import sys
from pathlib import Path

from studio.disk import RunFolder
from workers.fence import fence_of
from workers.process import hide_bars, run_process

MEMORY_HINT = (
    "Lower the micro-batch (and raise the accumulation), shorten the longest example, turn "
    "gradient checkpointing on, or choose qlora."
)


def main() -> int:
    """Train; say in error.json what went wrong.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m workers.engine", description="Train one run.")
    parser.add_argument("run_dir", type=Path, help="folder with spec.json and dataset.jsonl")
    folder = RunFolder(path=parser.parse_args().run_dir.resolve())
    return run_process(
        folder.error, lambda: _train(folder), memory_hint=MEMORY_HINT, fence=fence_of(folder)
    )


def _train(folder: RunFolder) -> None:
    # 5 s, in which the process is tied and fenced already.
    from workers.engine.train import train

    hide_bars()
    train(folder)


if __name__ == "__main__":
    sys.exit(main())
