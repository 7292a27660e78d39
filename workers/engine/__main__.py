"""One training run as a process.

    torchrun --standalone --nproc-per-node=1 -m workers.engine RUN_DIR
    python -m workers.engine RUN_DIR

RUN_DIR holds spec.json and dataset.jsonl (studio/disk.py). Exit code 0: see result.json, which
says FINISHED or STOPPED; 64: what the user gave is wrong; 1: any other failure; for both see
error.json. Not covered: restarts; a run that fails is started anew.
"""

import argparse
import ctypes
import errno
import logging
import signal
import sys
import warnings
from pathlib import Path

import torch
import transformers

from studio.disk import RunFolder
from studio.errors import EngineError, InputError, MachineError, StudioError
from workers.engine.report import write_error
from workers.engine.train import train

EXIT_INPUT = 64  # EX_USAGE of sysexits.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> int:
    """Train; say in error.json what went wrong.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m workers.engine", description="Train one run.")
    parser.add_argument("run_dir", type=Path, help="folder with spec.json and dataset.jsonl")
    folder = RunFolder(path=parser.parse_args().run_dir.resolve())
    _die_with_parent()
    _speak_plainly()
    try:
        train(folder)
    except StudioError as error:
        return _failed(folder, error)
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        return _failed(folder, _out_of_memory(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _failed(folder, _disk_full())
        message = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        write_error(folder, None, type_name=type(error).__name__, message=message)
        raise
    return 0


def _failed(folder: RunFolder, error: StudioError) -> int:
    logging.getLogger(__name__).error("%s", error, exc_info=error)
    write_error(folder, error, type_name=type(error).__name__, message=error.message)
    return EXIT_INPUT if isinstance(error, InputError) else 1


def _out_of_memory(error: BaseException) -> EngineError:
    where = "GPU" if isinstance(error, torch.cuda.OutOfMemoryError) else "machine"
    return EngineError(
        f"The {where} ran out of memory.",
        "Lower the micro-batch (and raise the accumulation), shorten the longest example, turn "
        "gradient checkpointing on, or choose qlora.",
    )


def _disk_full() -> MachineError:
    return MachineError("The disk is full.", "Free some space, then start the run again.")


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies: no trainer is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _speak_plainly() -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.captureWarnings(True)
    warnings.simplefilter("once")
    # The stage file tells how far loading is; a bar only fills the log with carriage returns.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.exit(main())
