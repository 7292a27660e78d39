"""A worker whose patience is that of a test: `python -m tests.faults.worker CONSTANTS WORKER-ARGS`.

CONSTANTS is JSON: {"workers.launcher.STOP_GRACE_SECONDS": 1, ...}. They are set before whatever
copies them is imported. TRAINER is the module that its ranks execute, AGENT whether torchrun starts
them: it takes two seconds that not every test has use for.
"""

import importlib
import json
import sys
from pathlib import Path


def main() -> int:
    """Set the constants, then be a worker."""
    constants = json.loads(sys.argv[1])
    trainer, has_agent = constants.pop("TRAINER"), constants.pop("AGENT")
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant)
        setattr(sys.modules[module], constant, value)
    from workers.__main__ import main as work  # with the constants in place
    from workers.launcher import trainer_command

    def command(folder: Path, num_gpus: int) -> list[str]:
        if has_agent:
            return trainer_command(folder, num_gpus, trainer)
        return [sys.executable, "-m", trainer, str(folder)]

    return work(sys.argv[2:], command=command)


if __name__ == "__main__":
    sys.exit(main())
