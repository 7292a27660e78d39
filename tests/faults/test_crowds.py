"""Two of something where there should be one: pages, versions, runs that want all cards."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import pytest

from studio.errors import MachineError
from studio.locks import is_locked, take_lock
from studio.services.workers import need_worker
from studio.store import workers
from studio.store.clock import boot_id
from studio.store.rows import WorkerRow
from tests.e2e.conftest import ROOT, end_worker, free_port
from tests.faults.scene import Scene, wait_until

TWO = "0, GPU-aa, H100, 81920, 1024\n1, GPU-bb, H100, 81920, 1024\n"
KILLED = "The process was killed by the system, most often for want of memory."


def two_cards(folder: Path) -> dict[str, str]:
    """Return the PATH of a machine whose driver tells of two cards."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{TWO}END\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.getenv('PATH')}"}


@pytest.mark.slow
def test_j21_two_runs_for_all_cards_follow_one_another(fresh: Scene, tmp_path: Path) -> None:
    env = two_cards(tmp_path / "bin")
    for _ in range(2):
        fresh.start_worker({"AGENT": True}, env)
    fresh.hold("loading")
    first, second = fresh.submit(num_gpus=2), fresh.submit(num_gpus=2)
    fresh.wait_at("loading")
    assert [fresh.row(run_id).state for run_id in (first, second)] == ["RUNNING", "QUEUED"]
    assert fresh.row(first).gpus == [0, 1]
    ranks = [pid for pid, kind in fresh.processes(first).items() if kind == "rank"]
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(max(ranks), signal.SIGKILL)  # rank 1 alone
    wait_until(lambda: not {pid for pid in ranks if Path(f"/proc/{pid}").exists()}, "all are gone")
    assert time.monotonic() - began < 3.0
    fresh.release("loading")
    assert [fresh.finish(run_id).state for run_id in (first, second)] == ["FINISHED"] * 2
    assert [fresh.row(run_id).epoch for run_id in (first, second)] == [2, 1]
    assert fresh.told(first, "crashed")[0].startswith(KILLED)
    assert fresh.no_overlaps()


# ---- pages --------------------------------------------------------------------------------------


def start_page(scene: Scene, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "studio", "up", "--home", str(scene.home.path)]
    return subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def answers(port: int) -> bool:
    try:
        health = httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False, timeout=30)
    except httpx.TransportError:
        return False
    return health.status_code == 200 and bool(health.json()["worker"])


@pytest.mark.slow
def test_p25_two_pages_on_one_home_share_its_worker(fresh: Scene) -> None:
    ports = [free_port(), free_port()]
    pages = [start_page(fresh, port) for port in ports]
    try:
        for port in ports:
            wait_until(partial(answers, port), f"that the page on port {port} answers")
        again = start_page(fresh, ports[0])
        out, _ = again.communicate(timeout=60)
        assert again.returncode == 2
        assert f"Port {ports[0]} on 127.0.0.1 is in use." in " ".join(out.split())
        alive = [name for name in fresh.owners if is_locked(fresh.home.worker(name))]
        assert len(alive) == 1
    finally:
        for page in pages:
            page.kill()
            page.communicate()
        end_worker(fresh.home)


def add_worker(scene: Scene, version: str) -> WorkerRow:
    row = WorkerRow(
        name="worker-of-old",
        host="here",
        boot_id=boot_id(),
        pid=4711,
        version=version,
        started_at=1.0,
        cards=[],
    )
    with scene.database.write() as session:
        workers.report(session, row)
    return row


def test_p26_a_worker_of_another_version_is_refused_with_both(fresh: Scene) -> None:
    row = add_worker(fresh, "0.0.9")
    lock = take_lock(fresh.home.worker(row.name))
    assert lock is not None
    with lock, pytest.raises(MachineError) as refused:
        need_worker(fresh.studio)
    assert refused.value.message == (
        "A worker on here is of version 0.0.9, and this is version 0.1.0."
    )
    assert refused.value.hint.startswith(
        "End it there with `kill 4711`: its runs save a checkpoint"
    )
    # A dead one refuses nobody.
    with need_worker(fresh.studio):
        pass
    end_worker(fresh.home)
