"""A real studio: the page in its own process, with its embedded worker, on a free port."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, sync_playwright

from studio.disk import Home
from studio.locks import is_locked
from tests.fakes import make_home

START_SECONDS = 120
CHROMIUM = "/usr/bin/chromium"
ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "test-output" / "screenshots"
# pytest's temporary folders keep what a failed test left; the log of page and worker lie there.


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A studio that runs."""

    url: str
    home: Home
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, verdicts: Path) -> Iterator[Running]:
    home = make_home(tmp_path_factory.mktemp("home"), verdicts)
    port = free_port()
    log = home.path / "page.log"
    command = [sys.executable, "-m", "studio", "up", "--home", str(home.path), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_page(url, process, log)
        yield Running(url=url, home=home, process=process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        end_worker(home)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_page(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the page ended: {log.read_text()}")
        try:
            if httpx.get(f"{url}/healthz", trust_env=False, timeout=30).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise TimeoutError(log.read_text())


def end_worker(home: Home) -> None:
    """Ask the embedded worker to end, and kill it when it does not: no test leaves one behind."""
    if not is_locked(home.worker_lock):
        return
    pid = int(home.worker_lock.read_text().split()[0])
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while is_locked(home.worker_lock) and time.monotonic() < deadline:
        time.sleep(0.1)
    if is_locked(home.worker_lock):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # The background flags keep Chromium itself from calling home, so that every request that
        # the test sees is the page's.
        yield playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-background-networking",
                "--disable-sync",
                "--disable-component-update",
                "--no-first-run",
            ],
        )
