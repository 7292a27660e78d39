"""One training run as a process.

    torchrun --standalone --nproc-per-node=1 -m workers.engine RUN_DIR
    python -m workers.engine RUN_DIR

RUN_DIR holds spec.json and dataset.jsonl (studio/disk.py). Exit code 0: see result.json, which
says FINISHED or STOPPED; 64: what the user gave is wrong; 1: any other failure; for both see
error.json. Not covered: restarts; a run that fails is started anew.
"""

import argparse
import sys
from pathlib import Path

from studio.disk import RunFolder
from workers.engine.train import train
from workers.process import run_process

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
    return run_process(folder.error, lambda: train(folder), memory_hint=MEMORY_HINT)


if __name__ == "__main__":
    sys.exit(main())
