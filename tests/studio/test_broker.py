"""The embedded broker with real Celery workers: nothing that happens to its folder ends one."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from kombu.connection import Connection
from kombu.entity import Queue

from studio.broker import TRANSPORT
from studio.disk import Home
from studio.dispatch import Bell, CeleryDispatch
from tests.listener import Listener, heard, listening, wait_until

SENTENCE = "the folder of messages cannot be used"
POISON = {
    "empty": b"",
    "truncated": b'{"body": "W1tdLCB7fSw',
    "binary": b"\xff\xfe\x00\x01",
    "wrong-shape": b'{"properties": {"delivery_tag": "1"}, "headers": [], "body": 7}',
    "deep": b"[" * 100_000,
}


def make_home(folder: Path) -> Home:
    home = Home(path=folder)
    home.create()
    return home


def files(home: Home, part: str) -> list[Path]:
    return sorted((home.broker / part).iterdir())


def ring_and_hear(home: Home) -> None:
    before = len(heard(home))
    CeleryDispatch(home).ring(Bell.TRAIN)
    wait_until(lambda: len(heard(home)) > before)


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listener]:
    """One worker with early acknowledgement, as the studio's own, for all tests of this file."""
    with listening(make_home(tmp_path_factory.mktemp("home"))) as listener:
        ring_and_hear(listener.home)
        yield listener
        assert listener.process.poll() is None


def test_poison_is_put_aside_and_the_bells_behind_it_are_heard(listener: Listener) -> None:
    home = listener.home
    for name, content in POISON.items():
        part = home.broker / "queue" / f"{name}.part"
        part.write_bytes(content)
        part.rename(home.broker / "queue" / f"0_{name}.celery.msg")
    ring_and_hear(home)
    # A folder that is read while it is written may show a file only at the next look.
    wait_until(lambda: len(files(home, "dead")) == len(POISON))
    dead = {path.name.partition("_")[2]: path.read_bytes() for path in files(home, "dead")}
    assert dead == {f"0_{name}.celery.msg": content for name, content in POISON.items()}
    assert listener.log.count("cannot be read, put aside") == len(POISON)


def test_a_thousand_copies_of_one_bell_are_only_a_thousand_bells(listener: Listener) -> None:
    home = listener.home
    before = len(heard(home))
    aside = make_home(home.path / "aside")
    CeleryDispatch(aside).ring(Bell.MERGE)
    (bell,) = files(aside, "queue")
    for number in range(1000):
        shutil.copy(bell, bell.with_name("copying"))
        name = f"{number:020d}_copy.celery.msg"
        bell.with_name("copying").rename(home.broker / "queue" / name)
    wait_until(lambda: len(heard(home)) == before + 1000)
    ring_and_hear(home)
    wait_until(lambda: files(home, "queue") == files(home, "inflight") == [])


@pytest.mark.parametrize("part", ["queue", "inflight", "owners", ""])
def test_a_folder_that_is_deleted_meanwhile_is_made_again(listener: Listener, part: str) -> None:
    # Renamed first: the worker may make it again while its files are being removed.
    gone = listener.home.path / "gone"
    (listener.home.broker / part).rename(gone)
    shutil.rmtree(gone)
    ring_and_hear(listener.home)
    ring_and_hear(listener.home)
    assert (listener.home.broker / part).stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_logged_once_and_used_when_it_can(
    listener: Listener,
) -> None:
    queue = listener.home.broker / "queue"
    said = listener.log.count(SENTENCE)
    while not queue.is_file():  # the worker may make the folder again in between
        shutil.rmtree(queue, ignore_errors=True)
        with suppress(FileExistsError):
            queue.touch(exist_ok=False)
    wait_until(lambda: listener.log.count(SENTENCE) > said)
    time.sleep(0.5)  # some more looks
    queue.unlink()
    ring_and_hear(listener.home)
    assert listener.log.count(SENTENCE) == said + 1


def test_a_worker_killed_in_the_middle_loses_nothing_under_late_acknowledgement(
    tmp_path: Path,
) -> None:
    home = make_home(tmp_path / "home")
    hold = home.path / "hold"
    hold.touch()
    dispatch = CeleryDispatch(home)
    for _ in range(12):
        dispatch.ring(Bell.TRAIN)
    rung = {json.loads(path.read_bytes())["headers"]["id"] for path in files(home, "queue")}
    with ExitStack() as stack:
        workers = [stack.enter_context(listening(home, is_late=True)) for _ in range(2)]
        wait_until(lambda: len(heard(home, "began")) == 2)
        assert len(files(home, "inflight")) >= 2
        victim = workers[0].process
        (lost,) = [name for name, pid in heard(home, "began") if pid == victim.pid]
        victim.kill()
        victim.wait()
        hold.unlink()
        wait_until(lambda: len(heard(home)) == len(rung))
        wait_until(lambda: files(home, "queue") == files(home, "inflight") == [])
    assert {name for name, _ in heard(home)} == rung
    began = [name for name, _ in heard(home, "began")]
    assert [name for name in rung if began.count(name) != 1] == [lost]


# ---- what no worker of ours does, and kombu may --------------------------------------------------


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Any]:
    options = {"folder": str(tmp_path / "broker"), "polling_interval": 0.01}
    with Connection("folder://", transport=TRANSPORT, transport_options=options) as connection:
        yield connection


def bell(connection: Any) -> None:
    """Send what the broker takes for a message of Celery."""
    connection.Producer().publish(
        [[], {}, {}], routing_key="q", declare=[Queue("q")], headers={"task": "t", "id": "1"}
    )


def test_a_message_that_is_refused_is_gone_and_one_that_is_put_back_is_not(
    connection: Any, tmp_path: Path
) -> None:
    bell(connection)
    queue = Queue("q", channel=connection.default_channel)
    queue.get().reject(requeue=True)
    queue.get().reject()
    assert queue.get() is None
    assert list((tmp_path / "broker" / "inflight").iterdir()) == []


def test_a_consumer_without_acknowledgement_leaves_nothing_in_flight(
    connection: Any, tmp_path: Path
) -> None:
    bell(connection)
    got: list[Any] = []
    consumer = connection.Consumer(
        [Queue("q")], callbacks=[lambda body, _: got.append(body)], no_ack=True
    )
    with consumer:
        connection.drain_events(timeout=5)
    assert got == [[[], {}, {}]]
    assert list((tmp_path / "broker" / "inflight").iterdir()) == []


def test_a_connection_that_closes_gives_back_what_it_had_not_acknowledged(
    connection: Any, tmp_path: Path
) -> None:
    bell(connection)
    channel = connection.channel()
    assert Queue("q", channel=channel).get() is not None
    assert list((tmp_path / "broker" / "queue").iterdir()) == []
    channel.close()
    assert len(list((tmp_path / "broker" / "queue").iterdir())) == 1
    assert list((tmp_path / "broker" / "owners").iterdir()) == []


def test_a_queue_says_how_long_it_is_and_can_be_emptied(connection: Any) -> None:
    for _ in range(3):
        bell(connection)
    queue = Queue("q", channel=connection.default_channel)
    assert queue.queue_declare(passive=True).message_count == 3
    assert queue.purge() == 3
    with pytest.raises(Empty):
        connection.default_channel._get("q")  # noqa: SLF001
