"""Two home folders that exchange their files through a store."""

import os
from pathlib import Path

import pytest

from studio.disk import Home
from studio.errors import MachineError
from studio.files import Files


@pytest.fixture
def store(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


def open_home(folder: Path, url: str) -> tuple[Home, Files]:
    home = Home(path=folder)
    home.create()
    return home, Files(home, url)


@pytest.fixture
def page(tmp_path: Path, store: str) -> tuple[Home, Files]:
    return open_home(tmp_path / "page", store)


@pytest.fixture
def worker(tmp_path: Path, store: str) -> tuple[Home, Files]:
    return open_home(tmp_path / "worker", store)


def test_what_one_machine_pushes_another_one_pulls(
    page: tuple[Home, Files], worker: tuple[Home, Files]
) -> None:
    folder = worker[0].run(3).checkpoint(8)
    (folder / "tensors").mkdir(parents=True)
    (folder / "tensors" / "a.safetensors").write_bytes(b"a" * 1000)
    (folder / "manifest.json").write_text("{}")
    (folder / ".hidden.part").write_text("not whole yet")
    worker[1].push(worker[0].run(3).path)
    page[1].pull(page[0].run(3).path)
    copied = page[0].run(3).checkpoint(8)
    names = sorted(f.relative_to(copied).as_posix() for f in copied.rglob("*") if f.is_file())
    assert names == ["manifest.json", "tensors/a.safetensors"]
    assert (copied / "tensors" / "a.safetensors").read_bytes() == b"a" * 1000


def test_only_what_has_changed_is_copied_again(
    page: tuple[Home, Files], worker: tuple[Home, Files], tmp_path: Path
) -> None:
    run = worker[0].run(1)
    run.path.mkdir()
    run.metrics.write_text("1\n")
    run.proofs.write_text("{}")
    worker[1].push(run.path)
    page[1].pull(page[0].run(1).path)
    there = page[0].run(1)
    before = {path: path.stat().st_ino for path in (there.metrics, there.proofs)}
    with run.metrics.open("a") as file:
        file.write("2\n")
    worker[1].push(run.path)
    page[1].pull(there.path)
    assert there.metrics.read_text() == "1\n2\n"
    assert there.metrics.stat().st_ino != before[there.metrics]
    assert there.proofs.stat().st_ino == before[there.proofs]
    assert list((tmp_path / "store").rglob("*.part")) == []


def test_what_is_not_there_is_no_fault(page: tuple[Home, Files]) -> None:
    page[1].push(page[0].run(9).path)
    page[1].pull(page[0].run(9).path)
    page[1].forget(page[0].run(9).checkpoints, [])
    assert not page[0].run(9).path.exists()


def test_checkpoints_that_are_not_kept_leave_the_store(
    page: tuple[Home, Files], worker: tuple[Home, Files]
) -> None:
    run = worker[0].run(1)
    for step in (2, 4):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "manifest.json").write_text("{}")
    worker[1].push(run.path)
    worker[1].forget(run.checkpoints, ["step-000004"])
    page[1].pull(page[0].run(1).path)
    assert [path.name for path in page[0].run(1).checkpoints.iterdir()] == ["step-000004"]


def test_without_a_store_nothing_is_copied(tmp_path: Path) -> None:
    home, files = open_home(tmp_path / "home", "")
    home.run(1).path.mkdir()
    files.push(home.run(1).path)
    files.pull(home.run(1).path)
    assert not files.is_on


def test_a_store_that_cannot_be_used_is_said_in_words(tmp_path: Path) -> None:
    home, files = open_home(tmp_path / "home", "s9://bucket/studio")
    (home.incoming / "x").write_text("x")
    with pytest.raises(MachineError, match=r"The store of files cannot be written: .*s9"):
        files.push(home.incoming / "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root cannot be refused a folder")
def test_a_store_without_rights_is_said_in_words(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    home, files = open_home(tmp_path / "home", (closed / "store").as_uri())
    (home.incoming / "x").write_text("x")
    with pytest.raises(MachineError, match="The store of files cannot be written"):
        files.push(home.incoming / "x")


def test_who_has_lost_the_right_to_write_there_writes_nothing_and_removes_nothing(
    page: tuple[Home, Files], worker: tuple[Home, Files], tmp_path: Path
) -> None:
    """A worker that stood still wakes up: what its successor has put there stays."""
    for home, step in ((worker[0], 2), (page[0], 4)):
        home.run(1).checkpoint(step).mkdir(parents=True)
        (home.run(1).checkpoint(step) / "manifest.json").write_text("{}")
    worker[1].push(worker[0].run(1).path)
    page[1].push(page[0].run(1).path)

    def lost() -> None:
        raise PermissionError("another worker has it")

    (worker[0].run(1).checkpoint(2) / "late").write_text("x")
    with pytest.raises(PermissionError):
        worker[1].push(worker[0].run(1).path, may=lost)
    with pytest.raises(PermissionError):
        worker[1].forget(worker[0].run(1).checkpoints, [], may=lost)
    worker[1].forget(worker[0].run(1).checkpoints, ["step-000002"])
    there = tmp_path / "store" / "runs" / "000001" / "checkpoints"
    assert sorted(path.name for path in there.iterdir()) == ["step-000002", "step-000004"]
    assert not (there / "step-000002" / "late").exists()


def test_a_store_cannot_write_beside_what_was_asked_for(tmp_path: Path, store: str) -> None:
    home, files = open_home(tmp_path / "home", store)
    inside = tmp_path / "store" / "runs" / "000001"
    inside.mkdir(parents=True)
    outside = tmp_path / "store" / "studio.db"
    outside.write_text("not yours")
    home.run(1).path.mkdir()
    # The folder is a link elsewhere within the store, as a foreign hand could make one.
    (inside / "up").symlink_to(tmp_path / "store", target_is_directory=True)
    files.pull(home.run(1).path)
    assert not home.database.exists()
