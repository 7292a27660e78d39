"""Run a module of this package as a tied process (workers/process.py): tied before it is imported.

    python -m workers.tied workers.merge ORDER_DIR

is `python -m workers.merge ORDER_DIR`, except that it dies with its starter in the seconds that
importing takes, too.
"""

import runpy
import sys

from workers.process import tie_process


def main() -> None:
    """Tie this process, then become the module that the command line names."""
    tie_process()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
