"""Many points, many watchers: nothing is lost, and what was measured is seen at once.

The long form is run by `make soak`; what it found lies in test-output/soak.
"""

import json
import os
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from studio.disk import write_whole
from studio.domain.run import RunState
from studio.services.studio import Studio, open_studio
from studio.settings import Settings
from studio.store.rows import PointRow, RunRow
from tests.soak import audit
from tests.soak.machine import Plan, Stage, add_runs, environment_of, start_worker
from tests.soak.report import OUTPUT, spread
from tests.soak.watch import (
    EYE_SECONDS,
    PAGE_SECONDS,
    Browser,
    Eye,
    Follower,
    page,
    read_as_the_page,
)

IS_LONG = bool(os.getenv("SOAK"))
TRAINERS, WATCHERS, POINTS_A_SECOND = 4, 20, 50
MAX_LAG_SECONDS = 2.0
WARM_SECONDS = 6.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was seen.

    Attributes:
        seconds: From the first step of a trainer to its last.
        rate: Steps a second of each trainer.
        missing: Points that were measured and are not stored, by Run.
        lag: Seconds from a point's way into the file until it is seen in the store.
        watching: Seconds that each look of a watcher took.
        worker_mib: Memory of the worker soon after its start and at the end.
        worker_files: Its open files, likewise.
        faults: What went wrong for a watcher.
    """

    seconds: float
    rate: list[float]
    points: int
    missing: dict[int, int]
    lag: dict[str, float]
    watching: dict[str, float]
    worker_mib: tuple[int, int]
    worker_files: tuple[int, int]
    faults: list[str]

    def save(self, name: str) -> None:
        """Keep it for whoever reads the table."""
        OUTPUT.mkdir(parents=True, exist_ok=True)
        write_whole(OUTPUT / f"{name}.json", json.dumps(vars(self), indent=2) + "\n")


def plan_of(seconds: float) -> Plan:
    steps = round(seconds * POINTS_A_SECOND)
    return Plan(
        runs=TRAINERS,
        kills=0,
        pauses=0,
        workers=1,
        cards=TRAINERS,
        lease_seconds=30.0,
        steps=(steps, steps),
        step_seconds=1 / POINTS_A_SECOND,
    )


def measure(stage: Stage, plan: Plan, *, with_page: bool) -> Measured:
    """Train, watch, and compare what was measured with what is stored."""
    studio, environment = stage.studio, environment_of(stage, plan)
    add_runs(studio, plan, random.Random(plan.seed))
    stage.audit.touch()
    eye = Eye(studio, range(1, plan.runs + 1))
    looking = Follower(eye.look, EYE_SECONDS)
    with ExitStack() as open_things:
        url = ""
        if with_page:
            url = open_things.enter_context(page(stage.folder, environment, studio.home.path))
        watchers = [_watcher(studio, url, number % plan.runs + 1) for number in range(WATCHERS)]
        worker = open_things.enter_context(_working(stage, environment))
        for follower in (looking, *watchers):
            follower.start()
            open_things.callback(follower.stop)
        time.sleep(WARM_SECONDS)
        warm = _size(worker.pid)
        _wait_until_over(studio, plan)
        time.sleep(1.0)  # the eye has seen the last points
        end = _size(worker.pid)
    lines = audit.read(stage.audit)
    lives = audit.lives(lines)
    stored = _stored(studio)
    return Measured(
        seconds=round(max((life.end - life.begin) / 1e9 for life in lives), 1),
        rate=[round(len(life.lines) * 1e9 / (life.end - life.begin), 1) for life in lives],
        points=sum(stored.values()),
        missing={
            life.run: missing
            for life in lives
            if (missing := sum(line.kind == audit.STEP for line in life.lines) - stored[life.run])
        },
        lag=spread(eye.lags),
        watching=spread([took for watcher in watchers for took in watcher.seconds]),
        worker_mib=(warm[0], end[0]),
        worker_files=(warm[1], end[1]),
        faults=[fault for one in (looking, *watchers) for fault in one.faults],
    )


def _watcher(studio: Studio, url: str, run_id: int) -> Follower:
    if not url:
        return Follower(lambda: read_as_the_page(studio, run_id), PAGE_SECONDS)
    return Follower(Browser(url, run_id).tick, PAGE_SECONDS)


@contextmanager
def _working(stage: Stage, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = start_worker(stage, environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def _size(pid: int) -> tuple[int, int]:
    """Return the memory of a process in MiB, and how many files it has open."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    [kib] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(kib) // 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _wait_until_over(studio: Studio, plan: Plan) -> None:
    deadline = time.monotonic() + 60 + 3 * plan.steps[1] * plan.step_seconds
    while time.monotonic() < deadline:
        with studio.database.read() as session:
            rows = session.query(RunRow).all()
        if all(RunState(row.state).is_final for row in rows):
            return
        time.sleep(0.5)
    raise TimeoutError("the runs do not end")


def _stored(studio: Studio) -> dict[int, int]:
    counts: dict[int, int] = defaultdict(int)
    with studio.database.read() as session:
        for (run_id,) in session.query(PointRow.run_id).filter(PointRow.name == "loss"):
            counts[run_id] += 1
    return counts


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    studio = open_studio(Settings(home=tmp_path / "home", embedded_worker=False))
    yield Stage(folder=tmp_path, studio=studio, kill_broker=lambda: None)
    studio.database.close()


def check(found: Measured, plan: Plan) -> None:
    assert found.faults == []
    assert found.missing == {}
    assert found.points == TRAINERS * plan.steps[1]
    assert found.lag["count"] == found.points
    assert found.lag["p99"] < MAX_LAG_SECONDS


@pytest.mark.slow
def test_no_point_is_lost_or_late_while_many_watch(stage: Stage) -> None:
    plan = plan_of(8)
    found = measure(stage, plan, with_page=False)
    found.save("metrics-short")
    check(found, plan)


@pytest.mark.skipif(not IS_LONG, reason="takes ten minutes: make soak")
@pytest.mark.timeout(2400)
def test_no_point_is_lost_or_late_in_ten_minutes_with_a_page(stage: Stage) -> None:
    plan = plan_of(600)
    found = measure(stage, plan, with_page=True)
    found.save("metrics")
    check(found, plan)
