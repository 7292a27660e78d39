"""Page and worker with a home folder each: rows in PostgreSQL, files through a store."""

import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from studio.disk import TEMPLATES
from studio.domain.fork import Keep
from studio.domain.run import RunState
from studio.services import artifacts, checkpoints, datasets, forks, run_files, runs
from studio.services.studio import Studio, open_studio
from studio.settings import Settings
from tests.e2e.conftest import ROOT
from tests.fakes import make_home
from tests.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]


def wait_until(condition: Callable[[], bool], worker: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert worker.poll() is None, "the worker has ended"
        assert time.monotonic() < deadline
        time.sleep(0.2)


def state(studio: Studio, run_id: int) -> RunState:
    return RunState(runs.get(studio, run_id).state)


@pytest.fixture
def page(
    tmp_path: Path,
    verdicts: Path,
    redis: RedisServer,
    postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Studio]:
    """The page's installation; the environment is that of its workers, too."""
    monkeypatch.setenv("STUDIO_DATABASE_URL", postgres.create_database(f"h_{uuid.uuid4().hex}"))
    monkeypatch.setenv("STUDIO_BROKER_URL", redis.url)
    monkeypatch.setenv("STUDIO_FILES_URL", (tmp_path / "store").as_uri())
    for name in ("page", "worker"):
        make_home(tmp_path / name, verdicts)
    studio = open_studio(Settings(home=tmp_path / "page"))
    yield studio
    studio.database.close()


@pytest.fixture
def worker(tmp_path: Path, page: Studio) -> Iterator[subprocess.Popen[bytes]]:
    """A worker whose home folder is not the page's."""
    assert page.files.is_on
    command = [sys.executable, "-m", "workers", "--home", str(tmp_path / "worker")]
    with (tmp_path / "worker.log").open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()


def test_a_run_its_fork_and_its_merge_travel_between_two_home_folders(
    tmp_path: Path, page: Studio, worker: subprocess.Popen[bytes]
) -> None:
    source = TEMPLATES / "data" / "tidemark-support.jsonl"
    assert datasets.import_file(page, source, "desk").row is not None
    changes = {"data": {"dataset": "desk"}, "train": {"max_steps": 6, "save_steps": 2}}
    run = runs.submit(page, runs.spec_from_preset(page, "tiny-qwen3.5", changes))
    wait_until(lambda: state(page, run.id).is_final, worker)
    see_run(page, run.id)
    spec = forks.changed_spec(page, run.id, {"train": {"max_steps": 8}})
    fork = forks.fork(page, run.id, 4, spec, keep=Keep.EVERYTHING)
    merge = artifacts.merge(page, run.id)
    wait_until(lambda: state(page, fork.id).is_final, worker)
    assert (state(page, fork.id), runs.get(page, fork.id).step) == (RunState.FINISHED, 8)
    loss = {row: runs.curves(page, row, ["loss"])["loss"] for row in (run.id, fork.id)}
    assert [point.step for point in loss[fork.id]] == list(range(1, 9))
    assert [p.value for p in loss[fork.id]][:4] == [p.value for p in loss[run.id]][:4]
    wait_until(lambda: RunState(artifacts.get(page, merge.id).state).is_final, worker)
    certificate = artifacts.certificate(artifacts.get(page, merge.id))
    assert certificate is not None
    assert certificate.passed
    stored = tmp_path / "store" / "merges" / f"{merge.id:06d}" / "model" / "config.json"
    assert json.loads(stored.read_text())["architectures"]
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0


def see_run(page: Studio, run_id: int) -> None:
    """See here what a run tells; its weights are not copied here."""
    assert state(page, run_id) is RunState.FINISHED, runs.get(page, run_id).error
    proved = {proof.name: proof.passed for proof in run_files.proofs(page, run_id).proofs}
    assert proved["learned"]
    assert "steps" in run_files.log_tail(page, run_id)
    assert not page.home.run(run_id).adapter.exists()
    assert artifacts.has_result(page, runs.get(page, run_id))
    assert [found.step for found in checkpoints.listing(page, run_id)] == [6, 4]
