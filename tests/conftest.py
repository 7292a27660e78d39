"""Fixtures that every floor uses."""

from pathlib import Path

import pytest

from studio.services.studio import Studio
from tests.fakes import make_studio


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
