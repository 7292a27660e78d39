"""Bells through a real Redis with a password: it may be emptied, killed, stopped, full or closed."""

import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from studio.disk import Home
from studio.dispatch import Bell, CeleryDispatch
from studio.settings import Settings
from tests.listener import Listener, heard, listening, wait_until
from tests.servers import RedisServer, redis_server

PASSWORD = "q7-Secret-Word"
MOST_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A Redis, a worker that listens to it, and one who rings."""

    server: RedisServer
    listener: Listener
    dispatch: CeleryDispatch

    def ring(self) -> None:
        """Ring, which never takes long."""
        began = time.monotonic()
        self.dispatch.ring(Bell.TRAIN)
        assert time.monotonic() - began < MOST_SECONDS

    def ring_and_hear(self) -> None:
        """Ring until the worker hears: as workers ring for what waits, again and again."""
        before = len(heard(self.listener.home))
        self.ring()
        wait_until(lambda: len(heard(self.listener.home)) > before)


@pytest.fixture(scope="module")
def place(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    # `redis` itself is for tests that leave it alive; where it is missing, these are skipped too.
    assert redis.ask("PING") == "PONG"
    home = Home(path=tmp_path_factory.mktemp("home"))
    home.create()
    folder = tmp_path_factory.mktemp("server")
    with redis_server(folder, password=PASSWORD) as server:
        dispatch = CeleryDispatch(home, Settings(broker_url=server.url))
        with listening(home, broker_url=server.url) as listener:
            place = Place(server=server, listener=listener, dispatch=dispatch)
            place.ring_and_hear()
            yield place
            assert listener.process.poll() is None
            assert PASSWORD not in listener.log


@pytest.fixture(autouse=True)
def _no_password_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.DEBUG):
        yield
    assert PASSWORD not in caplog.text


def test_the_folder_of_messages_is_not_used(place: Place) -> None:
    place.ring_and_hear()
    assert list((place.listener.home.broker / "queue").iterdir()) == []
    assert f"redis://:**@127.0.0.1:{place.server.port}/0" in place.listener.log


def test_a_thousand_bells_are_heard_and_leave_nothing_behind(place: Place) -> None:
    before = len(heard(place.listener.home))
    for _ in range(1000):
        place.ring()
    wait_until(lambda: len(heard(place.listener.home)) == before + 1000)
    wait_until(lambda: place.server.ask("EXISTS", "celery", "unacked") == "0")


def test_after_everything_was_flushed_the_next_bell_is_heard(place: Place) -> None:
    assert place.server.ask("FLUSHALL") == "OK"
    place.ring_and_hear()
    assert place.server.ask("FLUSHALL") == "OK"
    place.ring_and_hear()


def test_while_it_is_down_a_bell_is_lost_in_a_moment_and_said_once(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.server.kill()
    for _ in range(3):
        place.ring()
    assert caplog.text.count("was not rung") == 1
    place.server.start()
    place.ring_and_hear()  # the worker has found it again by itself
    assert caplog.text.count("the broker is there again") == 1
    place.server.kill()
    place.ring()
    assert caplog.text.count("was not rung") == 2
    place.server.start()
    place.ring_and_hear()


def test_one_that_does_not_answer_holds_nobody_up(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.server.process.send_signal(signal.SIGSTOP)
    try:
        place.ring()
        place.ring()
    finally:
        place.server.process.send_signal(signal.SIGCONT)
    assert caplog.text.count("was not rung") == 1
    place.ring_and_hear()


def test_one_that_is_full_loses_the_bell_in_words(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.server.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        place.ring()
    finally:
        place.server.ask("CONFIG", "SET", "maxmemory", "0")
    assert "used memory > 'maxmemory'" in caplog.text
    place.ring_and_hear()


def test_a_wrong_password_is_said_without_the_password(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = Home(path=tmp_path / "home")
    home.create()
    wrong = place.server.url.replace(PASSWORD, "Not-The-Word")
    CeleryDispatch(home, Settings(broker_url=wrong)).ring(Bell.TRAIN)
    assert "was not rung: invalid username-password pair" in caplog.text
    with listening(home, broker_url=wrong) as listener:
        wait_until(lambda: "Trying again in" in listener.log)
        assert listener.process.poll() is None
    assert "invalid username-password pair" in listener.log
    assert "Not-The-Word" not in listener.log + caplog.text


def test_tls_is_not_given_up_where_the_server_has_none(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secure = place.server.url.replace("redis://", "rediss://")
    waiting = heard(place.listener.home)
    began = time.monotonic()
    CeleryDispatch(Home(path=tmp_path), Settings(broker_url=secure)).ring(Bell.TRAIN)
    assert time.monotonic() - began < MOST_SECONDS
    assert "was not rung" in caplog.text
    assert heard(place.listener.home) == waiting
