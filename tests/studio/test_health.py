"""What docker compose asks about page and worker."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from studio.disk import Home
from studio.health import page_trouble, worker_trouble
from studio.locks import take_lock, worker_note
from tests.servers import free_port
from tests.serving import serve


@pytest.fixture(scope="module", params=[200, 500])
def page(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A page that answers with a status code: the code, and its port."""

    def health(_: Request) -> PlainTextResponse:
        return PlainTextResponse("{}", status_code=request.param)

    for url in serve(Starlette(routes=[Route("/healthz", health)])):
        yield request.param, int(url.rpartition(":")[2])


def test_a_page_is_well_when_it_answers_so(page: tuple[int, int]) -> None:
    status, port = page
    expected = {200: "", 500: "The page answers with code 500."}
    assert page_trouble(port) == expected[status]


def test_a_page_that_does_not_answer_is_not_well() -> None:
    assert "does not answer" in page_trouble(free_port())


@contextmanager
def a_worker(home: Home, pid: int) -> Iterator[Path]:
    """Hold a lock file as a worker does that says it is `pid`."""
    home.workers.mkdir(parents=True)
    file = home.worker(f"worker-{pid}")
    with take_lock(file) as lock:  # type: ignore[union-attr]
        lock.write(worker_note(pid, is_closing=False))
        lock.flush()
        yield file


def test_a_worker_is_well_while_it_holds_its_lock(tmp_path: Path) -> None:
    home = Home(path=tmp_path)
    assert "No worker of this machine" in worker_trouble(home)
    with a_worker(home, os.getpid()) as file:
        assert worker_trouble(home) == ""
    assert file.exists()
    assert "No worker of this machine" in worker_trouble(home)


def test_a_worker_of_another_machine_is_not_ours(tmp_path: Path) -> None:
    # Its number may be somebody's here, too; that one does not hold its lock.
    home = Home(path=tmp_path)
    with a_worker(home, os.getppid()):
        assert "No worker of this machine" in worker_trouble(home)


@pytest.mark.parametrize("content", ["", "x\n", "999999999\nopen\n", "-1\n"])
def test_a_lock_file_that_says_nothing_is_nobodys(tmp_path: Path, content: str) -> None:
    home = Home(path=tmp_path)
    home.workers.mkdir()
    home.worker("worker-x").write_text(content)
    assert "No worker of this machine" in worker_trouble(home)


def test_the_command_says_it_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path))
    command = [sys.executable, "-m", "studio.health", "worker"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"No worker of this machine serves {tmp_path}.\n"
    with a_worker(Home(path=tmp_path), os.getpid()):
        assert subprocess.run(command, check=False).returncode == 0
