"""Redis and PostgreSQL die and come back (P04, P05, B15): a run does not notice, none is lost."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from studio.domain.run import RunState
from tests.faults.conftest import make_scene
from tests.faults.scene import LEASE_SECONDS, Scene, wait_until
from tests.servers import (
    PostgresServer,
    ProgramMissingError,
    RedisServer,
    postgres_server,
    redis_server,
)


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RedisServer, PostgresServer]]:
    """A Redis that keeps nothing, and a PostgreSQL: both are killed here, and none of others."""
    folder = tmp_path_factory.mktemp("servers")
    try:
        with redis_server(folder) as redis, postgres_server(folder) as postgres:
            yield redis, postgres
    except ProgramMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def there(
    tmp_path_factory: pytest.TempPathFactory, servers: tuple[RedisServer, PostgresServer]
) -> Iterator[Scene]:
    """A worker on both servers, as docker compose starts it."""
    redis, postgres = servers
    scene = make_scene(
        tmp_path_factory.mktemp("there"), broker_url=redis.url, database_url=postgres.url
    )
    scene.start_worker()
    yield scene
    scene.close()


@contextmanager
def dead(server: RedisServer | PostgresServer, seconds: float) -> Iterator[None]:
    server.kill()
    yield
    time.sleep(seconds)
    server.start()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["redis", "postgres"])
def test_b15_p04_a_run_does_not_notice_that_a_server_dies(
    there: Scene, servers: tuple[RedisServer, PostgresServer], what: str
) -> None:
    server = servers[0] if what == "redis" else servers[1]
    there.hold("step 3")
    run_id = there.submit()
    there.wait_at("step 3")
    with dead(server, LEASE_SECONDS + 1.0):
        there.release("step 3")
    row = there.finish(run_id)
    assert (row.state, row.epoch, row.error) == ("FINISHED", 1, None)
    assert there.steps(run_id) == list(range(1, 9))
    assert there.workers[-1].poll() is None


@pytest.mark.slow
def test_p04_what_is_launched_while_redis_is_dead_starts_when_it_is_back(
    there: Scene, servers: tuple[RedisServer, PostgresServer]
) -> None:
    for _ in range(2):
        with dead(servers[0], 1.0):
            run_id = there.submit()
        assert there.finish(run_id).state == "FINISHED"


def test_p05_bells_that_are_lost_are_rung_again(
    there: Scene, servers: tuple[RedisServer, PostgresServer]
) -> None:
    there.kill(0, "worker")
    run_id = there.submit()
    servers[0].ask("FLUSHALL")
    there.start_worker()
    assert there.finish(run_id).state == "FINISHED"


@pytest.mark.parametrize("what", ["rank", "worker"])
def test_p01_a_run_outlives_its_processes_on_these_servers_too(there: Scene, what: str) -> None:
    there.need_worker()
    there.hold("step 5")
    run_id = there.submit()
    there.wait_at("step 5")
    began = time.monotonic()
    there.kill(run_id, what)
    there.release("step 5")
    there.need_worker()
    there.wait_for(run_id, RunState.RUNNING, RunState.FINISHED, epoch=2)
    there.recoveries[f"{what} at step 5, Redis and PostgreSQL"] = time.monotonic() - began
    row = there.finish(run_id)
    assert (row.state, row.epoch, row.error) == ("FINISHED", 2, None)
    assert there.steps(run_id) == list(range(1, 9))
    wait_until(lambda: not there.processes(run_id))
