"""A machine for a soak test: its cards, its Runs, and workers that train them."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from studio.services.studio import Studio
from studio.store import queue
from studio.store.rows import DatasetRow, RunRow
from tests.rows import NO_DATASET
from tests.soak.trainer import AUDIT, STEP_SECONDS, UNFENCED
from tests.soak.worker import LEASE_SECONDS, MODULE

ROOT = Path(__file__).resolve().parents[2]
CARD = "{number}, CARD-{number:02d}, Card of a test, 81920, 0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What happens, and how often.

    Attributes:
        runs: Runs in all.
        kills: Workers that are killed (kill -9); another one is started for each.
        pauses: Workers that are stopped (SIGSTOP) for longer than a Lease, and then go on.
        broker_kills: How often the broker is killed with what it holds.
        stops: Runs that somebody asks to stop.
        holds: Runs that somebody pauses and lets go on later.
        workers: Worker processes at a time.
        cards: GPUs that the machine seems to have.
        lease_seconds: Length of a Lease.
        steps: Least and most steps of a Run.
        step_seconds: Length of a step.
        busy: Share of the kills that shall hit a worker which trains something.
        is_fenced: False is the negative control.
        patience_seconds: How long all of it may take.
    """

    runs: int
    kills: int
    pauses: int
    broker_kills: int = 0
    stops: int = 0
    holds: int = 0
    workers: int = 2
    cards: int = 6
    lease_seconds: float = 2.0
    steps: tuple[int, int] = (10, 70)
    step_seconds: float = 0.05
    busy: float = 0.8
    is_fenced: bool = True
    patience_seconds: float = 120.0
    seed: int = 1


@dataclass(kw_only=True, slots=True)
class Stage:
    """Where a chaos takes place.

    Attributes:
        folder: Of this test.
        studio: The installation that the workers serve.
        kill_broker: Kills the broker and what it holds; another one is there when it returns.
    """

    folder: Path
    kill_broker: Callable[[], None]
    studio: Studio

    @property
    def audit(self) -> Path:
        """The file that all trainers write."""
        return self.folder / "audit.txt"

    @property
    def logs(self) -> list[Path]:
        """The logs of all workers."""
        return sorted(self.folder.glob("worker-*.log"))


def add_runs(studio: Studio, plan: Plan, chance: random.Random) -> None:
    """Queue the Runs of a plan, each for one card."""
    studio.home.dataset(NO_DATASET).write_text("{}\n", encoding="utf-8")
    with studio.database.write() as session:
        dataset = DatasetRow(
            name="d",
            sha256=NO_DATASET,
            source_name="d",
            num_conversations=1,
            size_bytes=1,
            report={},
            created_at=1.0,
        )
        session.add(dataset)
        session.flush()
        for number in range(plan.runs):
            steps = chance.randint(*plan.steps)
            train = {"max_steps": steps, "save_steps": max(2, steps // 10), "num_gpus": 1}
            row = RunRow(
                name=f"run {number}",
                preset="",
                dataset_id=dataset.id,
                spec={"data": {"dataset": NO_DATASET}, "train": train},
                num_gpus=1,
                created_at=time.time(),
            )
            queue.add(session, row)


def environment_of(stage: Stage, plan: Plan) -> dict[str, str]:
    """Return the environment of a worker on a machine that seems to have cards."""
    programs = stage.folder / "bin"
    programs.mkdir()
    cards = "\n".join(CARD.format(number=number) for number in range(plan.cards))
    driver = programs / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\ncat <<'END'\n{cards}\nEND\n", encoding="ascii")
    driver.chmod(0o755)
    inherited = dict(os.environ)  # noqa: TID251  # handed on
    return inherited | {
        "PATH": f"{programs}{os.pathsep}{inherited['PATH']}",
        "STUDIO_BROKER_URL": stage.studio.settings.broker_url,
        "STUDIO_DATABASE_URL": stage.studio.settings.database_url,
        LEASE_SECONDS: str(plan.lease_seconds),
        AUDIT: str(stage.audit),
        STEP_SECONDS: str(plan.step_seconds),
        UNFENCED: "" if plan.is_fenced else "1",
    }


def start_worker(stage: Stage, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker; its log lies beside the others'."""
    log = stage.folder / f"worker-{len(stage.logs):03d}.log"
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, "--home", str(stage.studio.home.path)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
