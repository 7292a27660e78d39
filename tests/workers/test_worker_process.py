"""One embedded worker as a real process: its lock, its bells, its end, and what it survives."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

import pytest

from studio.disk import TEMPLATES, Home
from studio.dispatch import Bell, CeleryDispatch
from studio.domain.run import RunState
from studio.locks import is_closing, is_locked, take_lock
from studio.services.workers import ensure_worker, need_worker
from studio.store import leases
from studio.store.database import Database
from studio.store.rows import RunRow
from tests.fakes import make_studio
from tests.rows import NO_DATASET, add_run, get_run
from workers.__main__ import IDLE_LOOKS_BEFORE_END, LOCK_TAKEN_EXIT_CODE, LOOK_SECONDS

GARBAGE = {
    "empty": b"",
    "torn": b'{"body": "ab',
    "binary": b"\xff\xfe\x00\x01",
    "number": b"7",
    "nothing": b"null",
    "object": b"{}",
    "no-tag": b'{"properties": {}}',
    "no-text": b'{"properties": {"delivery_tag": "1", "body_encoding": "base64"}, "body": "%"}',
    "strange-code": b'{"properties": {"delivery_tag": "1", "body_encoding": "x"}, "body": "a"}',
    "no-task": b'{"properties": {"delivery_tag": "1", "delivery_info": {}}, "headers": {}}',
    "no-body": b'{"properties": {"delivery_tag": "1", "delivery_info": {"exchange": "celery", '
    b'"routing_key": "celery"}}, "headers": {"task": "workers.tasks.train", "id": "1"}}',
    "no-call": b'{"properties": {"delivery_tag": "1", "delivery_info": {"exchange": "celery", '
    b'"routing_key": "celery"}, "body_encoding": "base64"}, "body": "e30=", "content-type": '
    b'"application/json", "headers": {"task": "workers.tasks.train", "id": "1"}}',
    "no-known-task": b'{"properties": {"delivery_tag": "1", "delivery_info": {"exchange": "celery",'
    b'"routing_key": "celery"}, "body_encoding": "base64"}, "body": "W1tdLHt9LHt9XQ==", "content-type": '
    b'"application/json", "headers": {"task": "workers.tasks.x", "id": "1"}}',
}
SENTENCE = "The file of the run's dataset is gone from the home folder."


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker that lives as long as `client` is open."""

    home: Home
    database: Database
    process: subprocess.Popen[bytes]
    client: TextIOWrapper
    started: float

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.home.worker_log.read_text(encoding="utf-8", errors="replace")

    def state(self, run_id: int) -> str:
        """Return the state of a Run."""
        return get_run(self.database, run_id).state


def command(home: Home) -> list[str]:
    return [sys.executable, "-m", "workers", "--home", str(home.path), "--embedded"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 100 seconds"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    home = Home(path=tmp_path_factory.mktemp("home"))
    home.create()
    client = take_lock(home.client_lock, shared=True)
    assert client is not None
    with home.worker_log.open("ab") as log:
        process = subprocess.Popen(command(home), stdout=log, stderr=subprocess.STDOUT)
    started = time.monotonic()
    wait_until(lambda: is_locked(home.worker_lock) or process.poll() is not None)
    worker = Worker(
        home=home,
        database=Database(home.database),
        process=process,
        client=client,
        started=started,
    )
    yield worker
    client.close()
    if process.poll() is None:
        process.kill()
    process.wait()


def test_a_bell_reaches_the_worker_through_celery(worker: Worker) -> None:
    # Nothing is queued yet, so that this bell is not one which the worker rings itself.
    CeleryDispatch(worker.home).ring(Bell.TRAIN)
    wait_until(lambda: "Task workers.tasks.train[" in worker.log)


def test_a_run_whose_dataset_file_is_gone_fails_in_words(worker: Worker) -> None:
    run_id = add_run(worker.database)
    CeleryDispatch(worker.home).ring(Bell.TRAIN)
    wait_until(lambda: RunState(worker.state(run_id)).is_final)
    row = get_run(worker.database, run_id)
    assert row.state == RunState.FAILED
    assert row.error is not None
    assert row.error["message"] == SENTENCE


def test_a_run_that_is_stopped_while_it_starts_has_not_failed(worker: Worker) -> None:
    file = worker.home.dataset(NO_DATASET)
    shutil.copy(TEMPLATES / "data" / "tidemark-support.jsonl", file)
    run_id = add_run(worker.database)
    CeleryDispatch(worker.home).ring(Bell.TRAIN)
    wait_until(lambda: worker.state(run_id) != RunState.QUEUED)
    with worker.database.write() as session:
        assert leases.move(session, RunRow, run_id, RunState.STOPPING)
    wait_until(lambda: RunState(worker.state(run_id)).is_final)
    row = get_run(worker.database, run_id)
    assert (row.state, row.error) == (RunState.STOPPED, None)
    file.unlink()


def test_a_second_worker_on_the_same_home_says_so_and_leaves(worker: Worker) -> None:
    second = subprocess.run(command(worker.home), capture_output=True, text=True, check=False)
    assert second.returncode == LOCK_TAKEN_EXIT_CODE
    assert f"another worker serves {worker.home.path} already" in second.stderr
    assert worker.process.poll() is None
    assert worker.home.worker_lock.read_text() == f"{worker.process.pid}\nopen\n"


def test_messages_that_cannot_be_read_do_not_end_the_worker(worker: Worker) -> None:
    queue = worker.home.broker / "queue"
    for name, content in GARBAGE.items():
        part = queue / f"{name}.part"
        part.write_bytes(content)
        part.rename(queue / f"0_{name}.celery.msg")
    run_id = add_run(worker.database)
    CeleryDispatch(worker.home).ring(Bell.TRAIN)
    wait_until(lambda: RunState(worker.state(run_id)).is_final or worker.process.poll() is not None)
    wait_until(lambda: not list(queue.iterdir()) or worker.process.poll() is not None)
    assert worker.process.poll() is None
    assert worker.state(run_id) == RunState.FAILED
    assert "cannot be read, put aside" in worker.log


def test_the_worker_lives_while_a_page_is_open_and_ends_by_itself_afterwards(
    worker: Worker,
) -> None:
    looked_often = worker.started + (IDLE_LOOKS_BEFORE_END + 1) * LOOK_SECONDS
    time.sleep(max(0.0, looked_often - time.monotonic()))
    assert worker.process.poll() is None
    worker.client.close()
    assert worker.process.wait(100) == 0
    assert not is_locked(worker.home.worker_lock)
    assert "no page is open and nothing is left to do" in worker.log


def test_work_that_comes_while_a_worker_ends_gets_a_new_worker(tmp_path: Path) -> None:
    studio = make_studio(tmp_path)
    ensure_worker(studio.home)
    first = worker_number(studio.home)
    wait_until(lambda: is_closing(studio.home.worker_lock))
    run_id = add_run(studio.database)
    with need_worker(studio):
        assert worker_number(studio.home) != first
        CeleryDispatch(studio.home).ring(Bell.TRAIN)
        wait_until(lambda: get_run(studio.database, run_id).state == RunState.FAILED)
        os.kill(worker_number(studio.home), signal.SIGTERM)
        wait_until(lambda: not is_locked(studio.home.worker_lock))


def worker_number(home: Home) -> int:
    """Return the process number of the worker that has written its note last."""
    wait_until(lambda: home.worker_lock.read_text().endswith("\n"))
    return int(home.worker_lock.read_text().split()[0])
