"""Fixtures that every floor uses."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from studio.services.studio import Studio
from tests.fakes import make_studio
from tests.servers import (
    PostgresServer,
    ProgramMissingError,
    RedisServer,
    postgres_server,
    redis_server,
)


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which tokenizers have a fast path, for all homes: each is tested (4 to 7 s) by who asks first.

    tests/studio/tokens/test_tokenizer.py and the tests of the command line have folders of their
    own, so that the real test runs in them.
    """
    return tmp_path_factory.mktemp("verdicts")


@pytest.fixture
def studio(tmp_path: Path, verdicts: Path) -> Studio:
    """An installation in an empty home folder."""
    return make_studio(tmp_path / "home", verdicts)


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for all tests that do not kill it; each empties it (FLUSHALL) for itself."""
    try:
        with redis_server(tmp_path_factory.mktemp("redis")) as server:
            yield server
    except ProgramMissingError as error:
        _go_without(error)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests that do not kill it; each creates a database of its own."""
    try:
        with postgres_server(tmp_path_factory.mktemp("postgres")) as server:
            yield server
    except ProgramMissingError as error:
        _go_without(error)


def _go_without(error: ProgramMissingError) -> NoReturn:
    """Skip on a machine without the program; in CI nothing may be left out unseen."""
    if os.getenv("CI"):
        pytest.fail(str(error), pytrace=False)
    pytest.skip(str(error))
