"""Chaos: workers that are killed and paused, and a broker that dies, while Runs are trained.

Everything is real but the model: workers of this tree, their database and broker, signals of the
kernel, a process for each trainer (tests.soak.trainer). What is counted at the end comes from the
audit file, the files of the Runs and the database, never from what a worker says of itself.
"""

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from studio.domain.run import RunState
from studio.errors import ConflictError, MachineError
from studio.services import runs
from studio.store.rows import RunRow
from tests.soak.machine import Plan, Stage, add_runs, environment_of, start_worker
from tests.soak.report import Blow, Report, judge
from tests.soak.trainer import since_start
from workers import launcher

LOOK_SECONDS = 0.1
END_SECONDS = 60.0


@dataclass(kw_only=True, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    wakes_at: float = 0.0


class Chaos:
    """One chaos.

    Args:
        stage: Where.
        plan: What.
    """

    def __init__(self, stage: Stage, plan: Plan) -> None:
        self._stage, self._plan = stage, plan
        self._chance = random.Random(plan.seed)
        self._workers: list[_Worker] = []
        self._blows: list[Blow] = []
        self._stops: dict[int, float] = {}
        self._unasked_ends = 0
        self._environment = environment_of(stage, plan)

    def run(self) -> Report:
        """Let it happen until every Run is over, and judge what has become of them."""
        plan = self._plan
        began = time.monotonic()
        add_runs(self._stage.studio, plan, self._chance)
        (self._stage.audit).touch()
        try:
            for _ in range(plan.workers):
                self._start_worker()
            is_over = self._rage(began + plan.patience_seconds)
            seconds = time.monotonic() - began
            orphans = self._orphans() if is_over else -1
        finally:
            self._end()
        return judge(
            self._stage.studio,
            audit_file=self._stage.audit,
            logs=self._stage.logs,
            blows=self._blows,
            stops=self._stops,
            told={
                "runs": plan.runs,
                "lease_seconds": plan.lease_seconds,
                "workers": plan.workers,
                "cards": plan.cards,
                "seconds": round(seconds, 1),
                "orphans": orphans,
                "unasked_ends_of_workers": self._unasked_ends,
            },
        )

    def _rage(self, deadline: float) -> bool:
        """Return whether all Runs were over before the deadline."""
        plan = self._plan
        acts: list[Callable[[], bool]] = [self._kill] * plan.kills + [self._pause] * plan.pauses
        acts += [self._kill_broker] * plan.broker_kills
        acts += [self._stop_run] * plan.stops + [self._hold_run] * plan.holds
        self._chance.shuffle(acts)
        total, next_at = len(acts), 0.0
        while time.monotonic() < deadline:
            self._replace()
            done = self._count_over()
            if done == plan.runs:
                return True
            # So many for each Run, as the Runs end: the last act comes long before the last Run.
            is_due = acts and done / plan.runs >= 0.6 * (1 - len(acts) / total)
            if is_due and time.monotonic() >= next_at:
                if acts[-1]():
                    acts.pop()
                else:
                    self._chance.shuffle(acts)
                next_at = time.monotonic() + self._chance.uniform(0.0, plan.lease_seconds / 6)
            time.sleep(LOOK_SECONDS)
        return False

    # ---- acts: each returns whether it could be done now ----------------------------------------

    def _kill(self) -> bool:
        worker = self._chance.choice(self._workers)
        is_busy = any(row.step for row in self._live(worker))
        if not is_busy and self._chance.random() < self._plan.busy:
            return False
        at = since_start()
        worker.process.kill()
        worker.process.wait()
        self._workers.remove(worker)
        self._note("kill", at, worker)
        self._start_worker()
        return True

    def _pause(self) -> bool:
        awake = [worker for worker in self._workers if worker.wakes_at < time.monotonic()]
        if len(awake) < 2 or not self._live(worker := self._chance.choice(awake)):
            return False
        at = since_start()
        worker.process.send_signal(signal.SIGSTOP)
        length = self._plan.lease_seconds * self._chance.uniform(1.4, 2.0)
        # From a thread: a worker that was stopped while it wrote holds up this one, too.
        timer = threading.Timer(length, worker.process.send_signal, [signal.SIGCONT])
        timer.daemon = True
        timer.start()
        worker.wakes_at = time.monotonic() + length
        self._note("pause", at, worker, length)
        return True

    def _kill_broker(self) -> bool:
        self._stage.kill_broker()
        self._blows.append(Blow(kind="broker", at=since_start(), run=0, epoch=0))
        return True

    def _stop_run(self) -> bool:
        row = self._some_live()
        if row is None:
            return False
        try:
            runs.stop(self._stage.studio, row.id)
        except (ConflictError, MachineError):
            return False  # it has just ended; or a worker was stopped while it wrote
        self._stops[row.id] = since_start()
        return True

    def _hold_run(self) -> bool:
        row = self._some_live()
        if row is None:
            return False
        try:
            runs.pause(self._stage.studio, row.id)
        except (ConflictError, MachineError):
            return False
        return True

    # ---- what goes on beside ----------------------------------------------------------------------

    def _start_worker(self) -> None:
        process = start_worker(self._stage, self._environment)
        self._workers.append(_Worker(process=process))

    def _replace(self) -> None:
        """Start a worker for each that has ended by itself; none should."""
        for worker in [one for one in self._workers if one.process.poll() is not None]:
            self._unasked_ends += 1
            self._workers.remove(worker)
            self._start_worker()

    def _count_over(self) -> int:
        with self._stage.studio.database.read() as session:
            rows = session.query(RunRow).all()
        for row in rows:
            if row.is_held and row.state == RunState.QUEUED:
                with suppress(ConflictError, MachineError):
                    runs.resume(self._stage.studio, row.id)
        return sum(RunState(row.state).is_final for row in rows)

    def _live(self, worker: _Worker | None = None) -> list[RunRow]:
        with self._stage.studio.database.read() as session:
            rows = session.query(RunRow).filter(RunRow.state.in_(["RUNNING", "STOPPING"])).all()
        if worker is None:
            return rows
        return [row for row in rows if str(row.owner).split("-")[1] == str(worker.process.pid)]

    def _some_live(self) -> RunRow | None:
        live = [row for row in self._live() if row.state == RunState.RUNNING]
        return self._chance.choice(live) if live else None

    def _note(self, kind: str, at: float, worker: _Worker, seconds: float = 0.0) -> None:
        hit = [(row.id, row.epoch) for row in self._live(worker)]
        for run, epoch in [(0, 0), *hit]:  # 0 is the blow itself
            self._blows.append(Blow(kind=kind, at=at, run=run, epoch=epoch, seconds=seconds))

    def _orphans(self) -> int:
        """Return how many trainers live though no Run does."""
        mine = tuple(path.stem for path in self._stage.studio.home.workers.glob("*.lock"))
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            left = [pid for pid, mark in launcher.all_marks() if mark.endswith(mine)]
            if not left:
                return 0
            time.sleep(LOOK_SECONDS)
        return len(left)

    def _end(self) -> None:
        for worker in self._workers:
            worker.process.send_signal(signal.SIGCONT)
            worker.process.terminate()
        for worker in self._workers:
            try:
                worker.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._unasked_ends += 1
                worker.process.kill()
                worker.process.wait()
        mine = tuple(path.stem for path in self._stage.studio.home.workers.glob("*.lock"))
        for _, mark in list(launcher.all_marks()):
            if mark.endswith(mine):
                launcher.kill_marked(mark)
        self._stage.studio.database.close()
