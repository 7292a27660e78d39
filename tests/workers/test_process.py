"""Real processes: tied to their starter from the first moment, and failing in words."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from studio.disk import TEMPLATES
from studio.domain.outcome import ExitCode
from studio.errors import EngineError, MachineError, NotFoundError, StudioError
from studio.locks import is_locked
from workers.fence import MARK
from workers.process import SLOTS, code_of, out_of_memory

ROOT = TEMPLATES.parent
# A process that runs `{act}`; the folder is its first argument. Nothing heavy is imported.
PROGRAM = """
import os, sys, time
from pathlib import Path
from studio.disk import RunFolder
from studio.errors import *
from workers.fence import fence_of
from workers.process import run_process
run = RunFolder(path=Path(sys.argv[1]))
def act():
    assert "torch" not in sys.modules
    (run.path / str(os.getpid())).write_text("")
    {act}
sys.exit(run_process(run.error, act, memory_hint="Take less.", fence=fence_of(run)))
"""


def start(
    folder: Path, act: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    changes = [f"{name}={value}" for name, value in (environment or {}).items()]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            ["env", *changes, sys.executable, "-c", PROGRAM.format(act=act), str(folder)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it did not happen within 30 seconds"
        time.sleep(0.005)


def acts(folder: Path, process: subprocess.Popen[bytes]) -> bool:
    return (folder / str(process.pid)).exists()


# ---- ties -------------------------------------------------------------------------------------


def test_slots_are_held_for_life_and_made_where_they_are_missing(tmp_path: Path) -> None:
    slots = [tmp_path / "slots" / "boot" / name for name in ("a.ranks", "b.ranks")]
    environment = {SLOTS: os.pathsep.join(map(str, slots))}
    two = [start(tmp_path, "time.sleep(60)", environment) for _ in range(2)]
    wait_until(lambda: all(acts(tmp_path, process) for process in two))
    assert [is_locked(slot) for slot in slots] == [True, True]
    two[0].kill()
    two[0].wait()
    assert [is_locked(slot) for slot in slots] == [True, True]
    two[1].kill()
    two[1].wait()
    assert [is_locked(slot) for slot in slots] == [False, False]


def test_a_signal_shows_what_all_threads_do(tmp_path: Path) -> None:
    process = start(tmp_path, "time.sleep(60)")
    wait_until(lambda: acts(tmp_path, process))
    process.send_signal(signal.SIGUSR1)
    log = tmp_path / "log.txt"
    wait_until(lambda: "most recent call first" in log.read_text())
    wait_until(lambda: "run_process" in log.read_text())
    assert process.poll() is None
    process.kill()
    process.wait()


STARTER = """
import os, subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], env={**os.environ, "STUDIO_PARENT": str(os.getpid())})
print(child.pid, flush=True)
time.sleep(60)
"""
MODULE = "import time; from pathlib import Path; Path('{ready}').write_text(''); time.sleep(60)"


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a death signal")
def test_a_process_is_tied_before_the_module_that_it_runs_is_imported(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(MODULE.format(ready=tmp_path / "ready"))
    command = ["env", f"PYTHONPATH={tmp_path}", sys.executable, "-m", "workers.tied", "slow", "x"]
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, *command], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    child = int(starter.stdout.readline())
    wait_until(lambda: (tmp_path / "ready").exists())
    assert _is_alive(child)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    wait_until(lambda: not _is_alive(child))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a death signal")
def test_a_process_whose_starter_died_before_it_was_tied_ends_at_once(tmp_path: Path) -> None:
    # 1 is the parent that such a process would be given; ours is another one.
    process = start(tmp_path, "pass", {"STUDIO_PARENT": "1"})
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert not acts(tmp_path, process)


# ---- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "code", "type_name"),
    [
        ("raise InputError('No.')", ExitCode.INPUT, "InputError"),
        ("raise MachineError('No.')", ExitCode.MACHINE, "MachineError"),
        ("raise EngineError('No.', code=65)", ExitCode.DATA, "EngineError"),
        ("raise MemoryError", ExitCode.MEMORY, "EngineError"),
        ("raise OSError(28, 'full')", ExitCode.MACHINE, "MachineError"),
        ("raise KeyError('x')", ExitCode.UNEXPECTED, "KeyError"),
    ],
)
def test_an_exit_code_says_what_kind_of_failure_it_was_and_so_does_the_file(
    tmp_path: Path, act: str, code: ExitCode, type_name: str
) -> None:
    assert start(tmp_path, act).wait(timeout=30) == code
    error = json.loads((tmp_path / "error.json").read_text())
    assert (error["code"], error["type"]) == (code, type_name)
    assert set(error) == {"type", "message", "hint", "field", "code"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("x"), ExitCode.INPUT),
        (EngineError("x"), ExitCode.INPUT),
        (EngineError("x", code=ExitCode.RETRY), ExitCode.RETRY),
        (MachineError("x"), ExitCode.MACHINE),
        (out_of_memory(MemoryError()), ExitCode.MEMORY),
    ],
)
def test_an_error_without_a_code_is_not_tried_again(error: StudioError, code: ExitCode) -> None:
    assert code_of(error) == code


def test_of_several_ranks_the_first_to_fail_is_heard(tmp_path: Path) -> None:
    (tmp_path / "error.json").write_text('{"message": "of an earlier attempt"}')
    first, second = {"RANK": "0"}, {"RANK": "1"}
    assert start(tmp_path, "raise MachineError('Full.')", first).wait(timeout=30) == 74
    assert start(tmp_path, "raise OSError('Connection reset')", second).wait(timeout=30) == 1
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "Full."


def test_a_process_that_lost_its_run_says_and_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "owner.txt").write_text("runs:1:2:b")
    (tmp_path / "error.json").write_text("theirs")
    process = start(tmp_path, "pass", {MARK: "runs:1:1:a"})
    assert process.wait(timeout=30) == ExitCode.FENCED
    assert not acts(tmp_path, process)
    assert (tmp_path / "error.json").read_text() == "theirs"


def test_a_process_that_loses_its_run_keeps_its_failure_to_itself(tmp_path: Path) -> None:
    act = "run.owner.write_text('runs:1:2:b'); raise InputError('No.')"
    assert start(tmp_path, act, {MARK: "runs:1:1:a"}).wait(timeout=30) == ExitCode.FENCED
    assert not (tmp_path / "error.json").exists()
