"""Commands of `studio` as a person types them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.conftest import ROOT
from tests.e2e.forks import Forks

WRONG_INPUT = 2


class Shell:
    """Runs `studio` on one home folder.

    Args:
        home: The folder.
        forks: What runs the commands; without it each starts from nothing.
    """

    def __init__(self, home: Path, forks: Forks | None = None) -> None:
        self.home = home
        self._forks = forks

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one command."""
        arguments = (*arguments, "--home", str(self.home))
        if self._forks is not None:
            return self._forks.run(*arguments)
        command = [sys.executable, "-m", "studio", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    def values(self, *arguments: str) -> Any:
        """Run with --json and return what it prints; it must succeed."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refusal(self, *arguments: str) -> str:
        """Run what must be refused and return the words."""
        done = self.run(*arguments)
        assert done.returncode == WRONG_INPUT, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr
