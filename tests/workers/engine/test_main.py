"""The engine as the launcher sees it: a process with an exit code and files."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studio.disk import TEMPLATES, RunFolder
from tests.workers.engine.conftest import MakeRun
from workers.engine.build import build

ROOT = TEMPLATES.parent


def start(run: RunFolder) -> subprocess.Popen[bytes]:
    with run.log.open("wb") as log:
        command = [sys.executable, "-m", "workers.engine", str(run.path)]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and len(path.read_bytes().splitlines()) >= count:
            return
        time.sleep(0.05)
    pytest.fail(f"{path.name} never had {count} lines")


def test_sigterm_in_the_loop_saves_and_ends_well(make_run: MakeRun) -> None:
    run = make_run(train={"max_steps": 5000, "epochs": 1000})
    process = start(run)
    wait_for_lines(run.metrics, 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, run.log.read_text()
    result = json.loads(run.result.read_text())
    assert result["state"] == "STOPPED"
    assert 2 <= result["step"] < result["total_steps"] == 5000
    assert len(run.metrics.read_bytes().splitlines()) == result["step"]
    assert (run.adapter / "adapter_model.safetensors").exists()
    assert build(run).progress.step == result["step"]


def test_failures_are_words_and_an_exit_code(make_run: MakeRun) -> None:
    wrong, faulty = make_run(), make_run()
    wrong.spec.write_text('{"lora": {"rank": 0}}')
    faulty.proofs.mkdir()
    processes = [start(run) for run in (wrong, faulty)]
    assert [process.wait(timeout=120) for process in processes] == [64, 1]
    error = json.loads(wrong.error.read_text())
    assert error["type"] == "InputError"
    assert error["message"].startswith("lora.rank is 0")
    assert error["hint"] == "Correct the fields named here."
    assert error["code"] == 64
    error = json.loads(faulty.error.read_text())
    assert error["type"] == "IsADirectoryError"
    assert error["code"] == 1
    assert error["hint"] == "This is a fault of the studio; see log.txt."
    assert "Traceback" in faulty.log.read_text()
    assert not wrong.result.exists()
    assert not faulty.result.exists()
