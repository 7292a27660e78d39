"""A home folder, real workers on it, and a test that kills them."""

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from studio.disk import TEMPLATES, Home
from studio.dispatch import Bell, CeleryDispatch
from studio.domain.run import RunState
from studio.domain.spec import JobSpec
from studio.services import runs as verbs
from studio.services.studio import Studio, open_studio
from studio.settings import Settings
from studio.store import events, queue, runs
from studio.store.database import Database
from studio.store.rows import DatasetRow, EventRow, RunRow
from workers import launcher

ROOT = TEMPLATES.parent
PRELOAD = Path(__file__).parent / "preload"
STUB = "tests.faults.stub"
PATIENCE_SECONDS = 60.0
LEASE_SECONDS, TICK_SECONDS = 3.0, 0.5
# What takes minutes in life takes a second in a test.
QUICK = {
    "TRAINER": STUB,
    "AGENT": False,
    "studio.store.leases.LEASE_SECONDS": LEASE_SECONDS,
    "workers.launcher.STOP_GRACE_SECONDS": 1.0,
    "workers.supervise.RENEW_SECONDS": 0.5,
    "workers.supervise.DUMP_SECONDS": 0.5,
    "workers.reconcile.TICK_SECONDS": TICK_SECONDS,
}


def wait_until(condition: Callable[[], bool], what: str = "it") -> None:
    """Wait for something, and say what when it does not happen."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {PATIENCE_SECONDS:.0f} s"
        time.sleep(0.02)


def with_preload(**values: str) -> dict[str, str]:
    """Return the environment of processes that have the faults of preload/sitecustomize.py."""
    path = os.pathsep.join(filter(None, [str(PRELOAD), os.getenv("PYTHONPATH")]))
    return {"PYTHONPATH": path, **values}


@dataclass(kw_only=True)
class Scene:
    """Everything that a test of faults plays with.

    Attributes:
        faults: Folder that the stub trainer looks into.
        settings: Database and broker of the installation.
        recoveries: Seconds from a kill until the run was RUNNING again, by what was killed.
    """

    home: Home
    faults: Path
    settings: Settings
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    recoveries: dict[str, float] = field(default_factory=dict)
    database: Database = field(init=False)

    def __post_init__(self) -> None:
        """Make the folders."""
        self.home.create()
        for name in ("hold", "at"):
            (self.faults / name).mkdir(parents=True, exist_ok=True)
        self.script()
        self.database = Database(self.home.database, self.settings.database_url)
        self._dispatch = CeleryDispatch(self.home, self.settings)

    # ---- workers --------------------------------------------------------------------------

    def start_worker(
        self, constants: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a worker that lives until it is killed."""
        given = json.dumps({**QUICK, **(constants or {})})
        more = {"FAULTS": str(self.faults), "OMP_NUM_THREADS": "1", **(env or {})}
        for name in ("broker_url", "database_url"):
            if value := getattr(self.settings, name):
                more[f"STUDIO_{name.upper()}"] = value
        with self.home.worker_log.open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.worker", given, "--home", str(self.home.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **more},  # noqa: TID251
            )
        self.workers.append(worker)
        return worker

    def freeze(self, worker: subprocess.Popen[bytes]) -> None:
        """Stop a worker (SIGSTOP), but not while it keeps everybody from writing."""
        while True:
            worker.send_signal(signal.SIGSTOP)
            connection = sqlite3.connect(self.home.database, timeout=0.3, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            except sqlite3.OperationalError:
                worker.send_signal(signal.SIGCONT)
                time.sleep(0.05)
            else:
                return
            finally:
                connection.close()

    def need_worker(self, **constants: Any) -> subprocess.Popen[bytes]:
        """Return a worker that lives, or start one."""
        alive = [worker for worker in self.workers if worker.poll() is None]
        return alive[-1] if alive else self.start_worker(constants)

    @property
    def log(self) -> str:
        """What all workers have written."""
        return self.home.worker_log.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """End all workers; what they had started dies with them."""
        for point in (self.faults / "hold").iterdir():
            point.unlink()
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGCONT)
                worker.kill()
            worker.wait()
        self.database.close()

    # ---- runs -----------------------------------------------------------------------------

    def submit(self, num_gpus: int = 0, **train: Any) -> int:
        """Queue a Run of the stub trainer and return its number."""
        text = b'{"messages": []}\n'
        sha256 = hashlib.sha256(text).hexdigest()
        self.home.dataset(sha256).write_bytes(text)
        values = {"data": {"dataset": sha256}, "train": {"num_gpus": num_gpus, **train}}
        spec = JobSpec.model_validate(values).model_dump(mode="json")
        with self.database.write() as session:
            dataset = session.query(DatasetRow).first()
            if dataset is None:
                dataset = DatasetRow(
                    name="d",
                    sha256=sha256,
                    source_name="d",
                    num_conversations=1,
                    size_bytes=len(text),
                    report={},
                    created_at=time.time(),
                )
                session.add(dataset)
                session.flush()
            row = RunRow(
                name="r",
                preset="",
                dataset_id=dataset.id,
                spec=spec,
                created_at=time.time(),
                num_gpus=num_gpus,
            )
            queue.add(session, row)
        self.ring()
        return row.id

    @cached_property
    def studio(self) -> Studio:
        """The installation as page and commands see it."""
        return open_studio(self.settings)

    def stop(self, run_id: int) -> None:
        """Ask a Run to stop, as a user does."""
        verbs.stop(self.studio, run_id)

    def ring(self) -> None:
        """Say that there may be work."""
        self._dispatch.ring(Bell.TRAIN)

    def row(self, run_id: int) -> RunRow:
        """Return a Run."""
        with self.database.read() as session:
            return session.get_one(RunRow, run_id)

    def history(self, run_id: int) -> list[EventRow]:
        """Return what happened to a Run."""
        with self.database.read() as session:
            return list(events.of(session, RunRow, run_id))

    def told(self, run_id: int, kind: str) -> list[str]:
        """Return the sentences of one kind in the history of a Run."""
        return [event.text for event in self.history(run_id) if event.kind == kind]

    def steps(self, run_id: int) -> list[int]:
        """Return the steps that have a Point."""
        with self.database.read() as session:
            return [point.step for point in runs.curve(session, run_id, "loss")]

    def adapter(self, run_id: int) -> str:
        """Return the sha256 of what a Run has learned."""
        file = self.home.run(run_id).adapter / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def wait_for(self, run_id: int, *states: RunState, epoch: int = 0) -> RunRow:
        """Wait until a Run is in one of some states, in that try or a later one."""
        found: list[RunRow] = []

        def is_there() -> bool:
            found[:] = [self.row(run_id)]
            return found[0].state in states and found[0].epoch >= epoch

        try:
            wait_until(is_there, f"run {run_id} {states}")
        except AssertionError as error:
            log = self.log[-3000:]
            told = [(event.epoch, event.kind, event.text) for event in self.history(run_id)]
            row = self.row(run_id)
            raise AssertionError(
                f"{error}: {row.state} {row.stage} {row.error} {told}\n{log}"
            ) from error
        return found[0]

    def finish(self, run_id: int) -> RunRow:
        """Wait until a Run is over."""
        return self.wait_for(run_id, RunState.FINISHED, RunState.FAILED, RunState.STOPPED)

    # ---- the trainer ------------------------------------------------------------------------

    def script(self, **values: Any) -> None:
        """Say what the stub trainer does from its next start on."""
        (self.faults / "script.json").write_text(json.dumps(values))

    def hold(self, point: str) -> None:
        """Let the trainer halt at a point."""
        (self.faults / "at" / point).unlink(missing_ok=True)
        (self.faults / "hold" / point).touch()

    def release(self, point: str) -> None:
        """Let it go on."""
        (self.faults / "hold" / point).unlink(missing_ok=True)

    def claimed(self) -> int:
        """Return a Run that was claimed, and whose trainer has not begun yet.

        The disk of its worker is slow, so that there is time between the two.
        """
        self.start_worker(env=with_preload(SLOW_DISK="1.5"))
        run_id = self.submit()
        self.wait_for(run_id, RunState.RUNNING)
        assert not self.home.run(run_id).owner.exists()
        return run_id

    def wait_at(self, point: str) -> None:
        """Wait until the trainer is at a point."""
        wait_until((self.faults / "at" / point).exists, f"the trainer at {point!r}")

    def processes(self, run_id: int) -> dict[int, str]:
        """Return the process numbers of a Run, and what each is: "agent" or "rank"."""
        found = {}
        for pid, mark in list(launcher.all_marks()):
            if not mark.startswith(f"runs:{run_id}:") or mark.split(":")[3] not in self.owners:
                continue
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            found[pid] = "agent" if b"workers.agent" in words else "rank"
        return found

    @property
    def owners(self) -> set[str]:
        """Names of all workers that this home folder has seen."""
        return {path.stem for path in self.home.workers.glob("*.lock")}

    def kill(self, run_id: int, what: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the worker, or to the agent or the rank of a Run."""
        if what == "worker":
            worker = self.workers[-1]
            worker.send_signal(number)
            if number == signal.SIGKILL:
                worker.wait()
            return
        found = [pid for pid, kind in self.processes(run_id).items() if kind == what]
        assert found, f"no {what} of run {run_id} is alive"
        for pid in found:
            os.kill(pid, number)

    def no_overlaps(self) -> bool:
        """Tell whether no two trainers were ever alive on the same device."""
        return not (self.faults / "overlaps").exists()
