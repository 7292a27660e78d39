"""What a process that renders a foreign chat template may use, and when it ends.

A chat template comes with a model folder: it is a program that somebody else wrote. The process
that runs it has a bounded address space and processor time, none of the environment, and ends
with the process that started it.
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

MEMORY_BYTES = 2 * 2**30
# Of a tokenizer with 250,000 tokens, with the test of its fast path: a tenth of it.
LOAD_CPU_SECONDS = 60
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_child(*arguments: str, last_words: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `python -m studio.tokens` with some arguments, in its own session.

    Its standard input is what it lives by: it ends when that is closed.

    Args:
        arguments: What follows `studio.tokens`.
        last_words: File that receives its standard error.
    """
    root = str(Path(__file__).resolve().parent.parent.parent)
    return subprocess.Popen(
        [sys.executable, "-m", "studio.tokens", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=last_words,
        env={
            "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]),
            "PYTHONUTF8": "1",
            # Each thread and each arena of malloc takes address space, which is bounded.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "MALLOC_ARENA_MAX": "2",
        },
        cwd=root,
        start_new_session=True,
    )


def limit_memory(num_bytes: int) -> None:
    """Bound the address space of this process; what needs more raises MemoryError."""
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def memory_words(num_bytes: int) -> tuple[str, str]:
    """Return the sentences for a process that wanted more memory than it may have."""
    return (
        f"The model's chat template or tokenizer needs more than {num_bytes / 2**30:.0f} GiB of "
        "memory.",
        "Use the files that were published with the model, or split the conversation.",
    )


def grant_cpu(seconds: float) -> None:
    """Let this process use that much more processor time; the kernel ends it after that.

    The limit counts whole seconds, so up to one more is granted.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, most))


def end_with_starter() -> None:
    """End this process when its standard input is closed at the other end.

    The kernel is asked too, which also ends what Python cannot: the starter waits in the thread
    that started this process, whose end it is that counts.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        # Not sys.stdin: a thread that holds its lock cannot be ended with the interpreter.
        while os.read(0, 1):
            continue
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def peak_memory_bytes() -> int:
    """Return the most resident memory that this process had so far."""
    if sys.platform == "linux":
        # Not getrusage: its maximum survives exec, so it may be the parent's.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
