"""Nothing is lost, done twice or done by two at once, whatever dies; and the test can tell.

The long forms are run by `make soak`; what they found lies in test-output/soak.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from studio.services.studio import Studio, open_studio
from studio.settings import Settings
from tests.servers import PostgresServer, RedisServer, redis_server
from tests.soak.chaos import Chaos
from tests.soak.machine import Plan, Stage
from tests.soak.report import Report

IS_LONG = bool(os.getenv("SOAK"))
long = pytest.mark.skipif(not IS_LONG, reason="takes half an hour: make soak")
SHORT = Plan(runs=24, kills=8, pauses=3, broker_kills=2, stops=2, holds=2)
# The product's own Lease, and trainers that outlive it.
LONG = Plan(
    runs=320,
    kills=80,
    pauses=42,
    broker_kills=12,
    stops=16,
    holds=16,
    workers=5,
    cards=16,
    lease_seconds=30.0,
    steps=(20, 450),
    step_seconds=0.1,
    patience_seconds=3600.0,
)


@contextmanager
def opened(folder: Path, broker_url: str = "", database_url: str = "") -> Iterator[Studio]:
    settings = Settings(
        home=folder / "home",
        broker_url=broker_url,
        database_url=database_url,
        embedded_worker=False,
    )
    studio = open_studio(settings)
    yield studio
    studio.database.close()


def embedded(folder: Path, plan: Plan, database_url: str = "") -> Report:
    with opened(folder, database_url=database_url) as studio:

        def kill_broker() -> None:
            shutil.rmtree(studio.home.broker, ignore_errors=True)

        return Chaos(Stage(folder=folder, studio=studio, kill_broker=kill_broker), plan).run()


def with_redis(folder: Path, plan: Plan, database_url: str = "") -> Report:
    with redis_server(folder) as redis, opened(folder, redis.url, database_url) as studio:

        def kill_broker() -> None:
            kill(redis)

        return Chaos(Stage(folder=folder, studio=studio, kill_broker=kill_broker), plan).run()


def kill(redis: RedisServer) -> None:
    """Take all bells, and the server for a second."""
    redis.kill()
    time.sleep(1.0)
    redis.start()


def check(report: Report, name: str, plan: Plan) -> None:
    report.save(name)
    assert report.faults == {}
    assert report.blows["kill"] == plan.kills
    assert report.blows["pause"] == plan.pauses
    assert report.blows.get("broker", 0) == plan.broker_kills
    # Without these the chaos has shown nothing.
    assert report.tries > plan.runs
    assert report.recovery["kill"]["count"] > 0


@pytest.mark.slow
def test_nothing_is_lost_or_done_twice_in_a_short_chaos(tmp_path: Path) -> None:
    check(embedded(tmp_path, SHORT), "chaos-embedded-sqlite-short", SHORT)


@pytest.mark.slow
def test_nothing_is_lost_or_done_twice_with_servers(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    plan = replace(SHORT, runs=12, kills=3, pauses=2, broker_kills=1, seed=2)
    url = postgres.create_database("chaos")
    check(with_redis(tmp_path, plan, url), "chaos-redis-postgres-short", plan)


@pytest.mark.slow
def test_without_fences_the_same_chaos_has_overlaps(tmp_path: Path) -> None:
    # Only trainers that outlive the Lease can overlap with those who take over.
    plan = Plan(runs=6, kills=2, pauses=1, steps=(110, 130), busy=1.0, is_fenced=False)
    report = embedded(tmp_path, plan)
    report.save("control-unfenced-short")
    assert report.overlaps_of_runs
    assert report.overlaps_of_slots


@long
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
@pytest.mark.parametrize("broker", ["embedded", "redis"])
def test_a_long_chaos(
    tmp_path: Path, broker: str, database: str, request: pytest.FixtureRequest
) -> None:
    url = ""
    if database == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.create_database(f"chaos_{broker}")
    act = embedded if broker == "embedded" else with_redis
    check(act(tmp_path, LONG, url), f"chaos-{broker}-{database}", LONG)


@long
@pytest.mark.timeout(4000)
def test_a_long_chaos_without_fences_has_overlaps(tmp_path: Path) -> None:
    plan = replace(LONG, runs=40, kills=20, pauses=8, broker_kills=0, busy=1.0, is_fenced=False)
    report = embedded(tmp_path, plan)
    report.save("control-unfenced")
    assert report.overlaps_of_runs
    assert report.overlaps_of_slots
