"""Fixtures that every floor uses."""

from pathlib import Path

import pytest

from studio.services.studio import Studio
from tests.fakes import make_studio


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    """An installation in an empty home folder."""
    return make_studio(tmp_path / "home")
