"""Commands of `studio` without the second or two that its imports take.

Each command is a process of its own, with its own output and exit code: a fork of one process that
has imported everything. That the command line starts from nothing, too, is for other tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from studio.__main__ import main
from studio.disk import TEMPLATES

ROOT = TEMPLATES.parent


class Forks:
    """The process that forks.

    Args:
        folder: Holds what the commands write.
    """

    def __init__(self, folder: Path) -> None:
        self._files = folder / "out", folder / "err"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self._process.communicate()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one command of `studio`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = [*map(str, self._files), *arguments]
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        out, err = (file.read_text(encoding="utf-8") for file in self._files)
        return subprocess.CompletedProcess(arguments, code, out, err)


def serve() -> None:
    """Carry out the orders of standard input, one a line, and answer with their exit codes."""
    for line in sys.stdin:
        out, err, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, path in enumerate((os.devnull, out, err)):
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
                os.dup2(os.open(path, flags), number)
            sys.argv = ["studio", *arguments]
            main()
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
