"""Bells: they reach the folder whole, and a bell that cannot be rung does not stop anyone."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from studio.disk import Home
from studio.dispatch import Bell, CeleryDispatch


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(path=tmp_path / "home")
    home.create()
    return home


def messages(home: Home) -> list[Path]:
    return sorted((home.broker / "queue").iterdir())


@pytest.mark.parametrize("bell", list(Bell))
def test_a_bell_is_one_message_that_names_its_task_and_carries_nothing(
    home: Home, bell: Bell
) -> None:
    CeleryDispatch(home).ring(bell)
    (path,) = messages(home)
    message = json.loads(path.read_text(encoding="utf-8"))
    assert message["headers"]["task"] == bell.value
    assert message["headers"]["argsrepr"] == "()"
    assert path.stat().st_mode & 0o077 == 0  # only its owner reads it


def test_many_bells_are_many_messages(home: Home) -> None:
    dispatch = CeleryDispatch(home)
    for _ in range(20):
        dispatch.ring(Bell.TRAIN)
    assert len(messages(home)) == 20


def test_a_broker_folder_that_is_gone_is_made_again(home: Home) -> None:
    shutil.rmtree(home.broker)
    CeleryDispatch(home).ring(Bell.TRAIN)
    assert len(messages(home)) == 1


def test_a_home_folder_that_is_gone_is_logged_once_and_raises_nothing(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch = CeleryDispatch(home)
    shutil.rmtree(home.path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            dispatch.ring(Bell.TRAIN)
        assert caplog.text.count("the bell TRAIN was not rung") == 1
        home.create()
        dispatch.ring(Bell.TRAIN)
    assert len(messages(home)) == 1
    assert "the broker is there again: the bell TRAIN was rung" in caplog.text


def test_a_broker_folder_that_is_a_file_is_logged_and_raises_nothing(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    (home.broker / "queue").rmdir()
    (home.broker / "queue").touch()
    with caplog.at_level(logging.WARNING):
        CeleryDispatch(home).ring(Bell.MERGE)
    assert "the bell MERGE was not rung" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_broker_folder_that_cannot_be_written_raises_nothing(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    (home.broker / "queue").chmod(0o500)
    with caplog.at_level(logging.WARNING):
        CeleryDispatch(home).ring(Bell.TRAIN)
    (home.broker / "queue").chmod(0o700)
    assert "the bell TRAIN was not rung" in caplog.text
