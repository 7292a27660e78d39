"""A running job does not notice what happens to the page."""

import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from studio.disk import TEMPLATES
from studio.domain.run import RunState
from studio.locks import is_locked
from studio.services import datasets, runs
from studio.services.studio import open_studio
from studio.settings import Settings
from tests.e2e.conftest import ROOT, end_worker, free_port, wait_for_page
from tests.fakes import make_home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]


def start_page(home: Path, port: int) -> subprocess.Popen[bytes]:
    log = home / "page.log"
    command = [sys.executable, "-m", "studio", "up", "--home", str(home), "--port", str(port)]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    wait_for_page(f"http://127.0.0.1:{port}", process, log)
    return process


def test_a_run_outlives_a_killed_page_and_its_worker_ends_afterwards(
    tmp_path: Path, verdicts: Path
) -> None:
    make_home(tmp_path, verdicts)
    studio = open_studio(Settings(home=tmp_path))
    port = free_port()
    page = start_page(tmp_path, port)
    try:
        source = TEMPLATES / "data" / "tidemark-support.jsonl"
        assert datasets.import_file(studio, source, "desk").row is not None
        spec = runs.spec_from_preset(
            studio, "tiny-qwen3.5", {"data": {"dataset": "desk"}, "train": {"max_steps": 16}}
        )
        run = runs.submit(studio, spec)
        while runs.get(studio, run.id).step < 2:
            time.sleep(0.2)
        page.kill()
        page.wait()
        at_kill = runs.get(studio, run.id)
        assert at_kill.state == RunState.RUNNING
        page = start_page(tmp_path, port)
        health = httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False, timeout=30)
        assert health.json()["worker"]
        while not RunState((now := runs.get(studio, run.id)).state).is_final:
            time.sleep(0.2)
        assert (now.state, now.step, now.epoch) == (RunState.FINISHED, 16, at_kill.epoch)
        with studio.database.read():
            curve = runs.curves(studio, run.id, ["loss"])["loss"]
        assert [point.step for point in curve] == list(range(1, 17))
        page.terminate()
        page.wait()
        deadline = time.monotonic() + 60
        while is_locked(studio.home.worker_lock) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not is_locked(studio.home.worker_lock)
    finally:
        page.kill()
        page.wait()
        end_worker(studio.home)
