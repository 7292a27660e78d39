"""Processes that end with the one that started them, and that are killed when it is too late."""

import ctypes
import os
import signal
import sys

PARENT = "STUDIO_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends.

    A parent that died before this was called is noticed, too: STUDIO_PARENT names it in the
    environment of its children; grandchildren are told another one.
    """
    if sys.platform != "linux":
        return
    expected = os.environ.pop(PARENT, "")
    os.environ[PARENT] = str(os.getpid())  # for the children of this process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if expected and os.getppid() != int(expected):
        os.kill(os.getpid(), signal.SIGKILL)
