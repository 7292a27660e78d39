"""Kernels of this machine, tried in a process of their own."""

import subprocess
import sys

from pydantic import ValidationError

from studio.domain.kernels import Kernels
from studio.errors import MachineError

# Compiling every kernel for a new card takes about two minutes.
TIMEOUT_SECONDS = 600.0


def measure() -> Kernels:
    """Try every kernel on the best device of this machine.

    Raises:
        MachineError: The process ended without a result.
    """
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "workers.engine.kernels"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        # Libraries greet on standard output; the result is the last line.
        return Kernels.model_validate_json(ended.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            f"Trying the kernels took more than {TIMEOUT_SECONDS:.0f} seconds.",
            "Try again when no run works on the card.",
        ) from error
    except (subprocess.CalledProcessError, IndexError, ValidationError, OSError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise MachineError(
            f"The kernels could not be tried: {said[-1][:300] if said else 'no answer'}.",
            "Run `python -m workers.engine.kernels` to see all that is said.",
        ) from error
