"""What training, merge and chat processes share: how they begin, what they tell, how they fail.

Exit code 0: done; 64: what the user gave is wrong; 1: any other failure; for both see error.json.
"""

import ctypes
import errno
import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from studio.disk import OrderFolder, write_whole
from studio.errors import EngineError, InputError, MachineError, StudioError

EXIT_INPUT = 64  # EX_USAGE of sysexits.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
MEMORY_HINT = "Stop other runs and chats on it, or use a machine with more memory."

log = logging.getLogger(__name__)


def run_process(error_file: Path, act: Callable[[], None], *, memory_hint: str) -> int:
    """Carry out what a process was started for; say in its error file what went wrong.

    Args:
        error_file: Receives {"type", "message", "hint", "field"} of a failure.
        act: What to do.
        memory_hint: What a user can do when memory is used up.

    Returns:
        The exit code.
    """
    _die_with_parent()
    _speak_plainly()
    error_file.unlink(missing_ok=True)
    try:
        act()
    except StudioError as error:
        return _failed(error_file, error)
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        return _failed(error_file, out_of_memory(error, memory_hint))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = MachineError("The disk is full.", "Free some space, then start it again.")
            return _failed(error_file, full)
        message = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        hint = "This is a fault of the studio; see log.txt."
        _write_error(error_file, type(error).__name__, message, hint)
        raise
    return 0


def run_order(folder: OrderFolder, act: Callable[[OrderFolder], None]) -> int:
    """Carry out the order of a merge or a chat process.

    Args:
        folder: Folder of the order.
        act: What to do with it.

    Returns:
        The exit code.
    """
    return run_process(folder.error, lambda: act(folder), memory_hint=MEMORY_HINT)


def tell_stage(folder: OrderFolder, stage: str, detail: str, fraction: float) -> None:
    """Say what the process does now.

    Args:
        folder: Folder of the order.
        stage: One word.
        detail: What exactly, for a person.
        fraction: How much of all is done, 0 to 1.
    """
    values = {"stage": stage, "detail": detail, "fraction": round(fraction, 4)}
    write_whole(folder.stage, json.dumps(values))


def best_device() -> torch.device:
    """Return the first card, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def out_of_memory(error: BaseException, hint: str = MEMORY_HINT) -> EngineError:
    """Say in a sentence whose memory is used up."""
    where = "GPU" if isinstance(error, torch.cuda.OutOfMemoryError) else "machine"
    return EngineError(f"The {where} ran out of memory.", hint)


def _failed(error_file: Path, error: StudioError) -> int:
    log.error("%s", error, exc_info=error)
    _write_error(error_file, type(error).__name__, error.message, error.hint, error.field)
    return EXIT_INPUT if isinstance(error, InputError) else 1


def _write_error(
    error_file: Path, type_name: str, message: str, hint: str, field: str = ""
) -> None:
    values = {"type": type_name, "message": message, "hint": hint, "field": field}
    write_whole(error_file, json.dumps(values, indent=2))


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies: none is left behind."""
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
