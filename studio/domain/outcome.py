"""What the exit code of a trainer means: the contract between engine and worker.

Numbers from 64 on are those of sysexits.h where it has one that fits.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a trainer, a merge or a chat process ended."""

    DONE = 0
    UNEXPECTED = 1
    INPUT = 64  # EX_USAGE: what the user gave is wrong
    DATA = 65  # EX_DATAERR: the Dataset cannot be trained on
    NUMERIC = 70  # EX_SOFTWARE: loss or gradient is not finite
    MEMORY = 71  # EX_OSERR: a card or the machine has too little memory
    MACHINE = 74  # EX_IOERR: the disk is full or read-only
    RETRY = 75  # EX_TEMPFAIL: the same may succeed the next time
    FENCED = 76  # another worker has taken the run over


_RETRIED = frozenset({ExitCode.UNEXPECTED, ExitCode.RETRY})


def is_retried(code: int) -> bool:
    """Tell whether the studio itself starts the same work once more.

    What the user gave, numbers that are not finite, a full disk and too little memory would end
    the same way again, so they wait for the user. A death by signal was not the work's own choice.

    Args:
        code: As of subprocess, negative for a signal, or 128 + signal as a shell tells it.
    """
    return code < 0 or code > 128 or code in _RETRIED
