"""What training, merge and chat processes share: how they begin, what they tell, how they fail.

First a process is tied to who started it: it dies with its parent, holds the locks of its slots and
shows on SIGUSR1 what all its threads do. Nothing heavy is imported before that, nor by this module:
torch and transformers take seconds. Exit codes: studio.domain.outcome; whatever is neither DONE nor
FENCED has its words in error.json.
"""

import errno
import faulthandler
import fcntl
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from studio.disk import OrderFolder, write_whole
from studio.domain.outcome import ExitCode
from studio.errors import EngineError, MachineError, StudioError
from workers.fence import Fence, FencedError
from workers.mortal import die_with_parent

if TYPE_CHECKING:
    import torch

EXIT_INPUT = ExitCode.INPUT
SLOTS = "STUDIO_SLOTS"  # lock files, separated as a PATH is
_RANK = "RANK"  # torchrun's
_STDERR = 2
MEMORY_HINT = "Stop other runs and chats on it, or use a machine with more memory."

log = logging.getLogger(__name__)


def run_process(
    error_file: Path, act: Callable[[], None], *, memory_hint: str, fence: Fence | None = None
) -> int:
    """Carry out what a process was started for; say in its error file what went wrong.

    Args:
        error_file: Receives {"type", "message", "hint", "field", "code"} of a failure. Of several
            processes of a run the first to fail is heard: the others fail because of it.
        act: What to do; it imports torch and transformers itself.
        memory_hint: What a user can do when memory is used up.
        fence: Says whether this process may still write.

    Returns:
        The exit code.
    """
    try:
        tie_process()
        _speak_plainly()
        if fence is not None:
            fence.check()
        if os.environ.get(_RANK, "0") == "0":
            error_file.unlink(missing_ok=True)
        act()
    except FencedError as error:
        log.warning("%s", error)
        return ExitCode.FENCED
    except StudioError as error:
        return _failed(error_file, error, fence)
    except Exception as error:
        known = _known(error, memory_hint)
        if known is not None:
            return _failed(error_file, known, fence)
        message = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        words = EngineError(message, "This is a fault of the studio; see log.txt.")
        _write_error(error_file, type(error).__name__, words, ExitCode.UNEXPECTED, fence)
        raise
    return ExitCode.DONE


def run_order(folder: OrderFolder, act: Callable[[OrderFolder], None]) -> int:
    """Carry out the order of a merge or a chat process.

    Args:
        folder: Folder of the order.
        act: What to do with it.

    Returns:
        The exit code.
    """

    def carry_out() -> None:
        hide_bars()
        act(folder)

    return run_process(folder.error, carry_out, memory_hint=MEMORY_HINT)


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


def hide_bars() -> None:
    """Let transformers draw none: the stage file tells how far loading is."""
    import transformers  # 1 s, and its callers need it anyhow

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def best_device() -> "torch.device":
    """Return the first card, or the CPU where there is none."""
    import torch  # 2 s, and its callers have it already

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- failures ---------------------------------------------------------------------------------


def code_of(error: StudioError) -> ExitCode:
    """Return the exit code of an error that was said in words.

    Whoever raises it may name one. Without one it is the user's to change something: the same
    start would end with the same words.
    """
    if error.code:
        return ExitCode(error.code)
    return ExitCode.MACHINE if isinstance(error, MachineError) else ExitCode.INPUT


def out_of_memory(error: BaseException, hint: str = MEMORY_HINT) -> EngineError:
    """Say in a sentence whose memory is used up."""
    where = "GPU" if _is_of_card(error) else "machine"
    return EngineError(f"The {where} ran out of memory.", hint, code=ExitCode.MEMORY)


def _is_of_card(error: BaseException) -> bool:
    # By name, as torch may not be there: it is what went wrong, perhaps.
    return type(error).__name__ == "OutOfMemoryError"


def _known(error: Exception, memory_hint: str) -> StudioError | None:
    """Return in words what a library raised, as far as a user can do something about it."""
    # torch/c10/core/CPUAllocator.cpp: "DefaultCPUAllocator: can't allocate memory"
    is_of_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    if is_of_cpu or _is_of_card(error):
        return out_of_memory(error, memory_hint)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError("The disk is full.", "Free some space, then start it again.")
    return None


def _failed(error_file: Path, error: StudioError, fence: Fence | None) -> int:
    log.error("%s", error, exc_info=error)
    if fence is not None and fence.is_lost():
        return ExitCode.FENCED
    code = code_of(error)
    _write_error(error_file, type(error).__name__, error, code, fence)
    return code


def _write_error(
    error_file: Path, type_name: str, error: StudioError, code: ExitCode, fence: Fence | None
) -> None:
    if error_file.exists() or (fence is not None and fence.is_lost()):
        return
    values = {
        "type": type_name,
        "message": error.message,
        "hint": error.hint,
        "field": error.field,
        "code": int(code),
    }
    try:
        write_whole(error_file, json.dumps(values, indent=2))
    except (MachineError, OSError) as met:
        # On a full disk the exit code alone tells.
        log.error("%s could not be written: %s", error_file.name, met)


# ---- ties -------------------------------------------------------------------------------------


@cache
def tie_process() -> None:
    """Tie this process to who started it, once: the very first thing that it does.

    It dies with its parent, holds the locks of its slots as long as it lives, and writes on
    SIGUSR1 to standard error what all its threads do.
    """
    die_with_parent()
    faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True)
    slots = os.environ.get(SLOTS, "")  # what the launcher has handed over
    for path in filter(None, slots.split(os.pathsep)):
        _hold(Path(path))


def _hold(path: Path) -> None:
    """Share a lock until this process ends, however it ends."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Never closed: the kernel does that when the last thread is gone.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # Whoever holds it alone is looking for processes like this one; it waits until they are done.
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def _speak_plainly() -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.captureWarnings(True)
    warnings.simplefilter("once")
