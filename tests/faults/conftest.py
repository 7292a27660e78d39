"""Scenes of the tests of faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.disk import Home
from studio.settings import Settings
from tests.faults.scene import Scene

RECOVERIES: dict[str, float] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show how long it took until a run went on."""
    if RECOVERIES:
        terminalreporter.section("seconds from a fault until the run goes on")
    for what, seconds in RECOVERIES.items():
        terminalreporter.write_line(f"{seconds:6.2f}  {what}")


def make_scene(folder: Path, **settings: str) -> Scene:
    home = folder / "home"
    given = Settings(home=home, **settings)  # type: ignore[arg-type]
    scene = Scene(home=Home(path=home), faults=folder / "faults", settings=given)
    scene.recoveries = RECOVERIES
    return scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One home folder for a module."""
    scene = make_scene(tmp_path_factory.mktemp("scene"))
    yield scene
    scene.close()


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One home folder for a module, whose trainers torchrun starts, as in life."""
    scene = make_scene(tmp_path_factory.mktemp("torchrun"))
    scene.start_worker({"AGENT": True}, {"STUDIO_HANG_MINUTES": "0.05"})
    yield scene
    scene.close()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Scene]:
    """A home folder for one test."""
    scene = make_scene(tmp_path)
    yield scene
    scene.close()
