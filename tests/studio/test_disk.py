"""The contract on disk: whole files, locks between processes, and a disk that is full."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from studio.disk import Home, write_whole
from studio.errors import MachineError
from studio.locks import is_locked, take_lock
from studio.services import datasets
from tests.fakes import make_studio

HOLD = (
    "import sys; from pathlib import Path; from studio.locks import take_lock; "
    "lock = take_lock(Path(sys.argv[1]), shared=sys.argv[2] == 'shared'); "
    "print(lock is not None, flush=True); sys.stdin.read()"
)
SMALL_BYTES = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system that is small enough to fill")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs", str(folder)]
    answer = subprocess.run(mount, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {answer.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file:
        # What does not fit is cut off by the system; the next write does not fit at all.
        file.write(b"x" * 2 * SMALL_BYTES)


# ---- whole files ------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    write_whole(path, "one")
    write_whole(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_is_said_in_words(small_disk: Path) -> None:
    path = small_disk / "result.json"
    write_whole(path, "old")
    fill(small_disk)
    with pytest.raises(MachineError, match=r"The disk is full: writing result\.json failed"):
        write_whole(path, "new" * 10_000)
    assert path.read_text() == "old"
    assert sorted(small_disk.iterdir()) == [small_disk / "filler", path]


def test_a_dataset_that_does_not_fit_is_refused_and_nothing_of_it_is_kept(
    small_disk: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 900}]
    source = tmp_path / "large.jsonl.gz"  # packed, so that only writing it shows its size
    lines = "".join(json.dumps({"messages": turns, "id": n}) + "\n" for n in range(2000))
    source.write_bytes(gzip.compress(lines.encode()))
    studio = make_studio(small_disk / "home")
    studio = replace(studio, settings=studio.settings.model_copy(update={"min_free_bytes": 0}))
    with pytest.raises(MachineError) as caught:
        datasets.import_file(studio, source)
    assert (
        caught.value.message == "The disk is full: storing the dataset failed and nothing was kept."
    )
    assert "Free some space" in caught.value.hint
    assert datasets.listing(studio) == []
    assert list(studio.home.datasets.iterdir()) == []
    assert list(studio.home.incoming.iterdir()) == []
    small = tmp_path / "small.jsonl"
    small.write_text(json.dumps({"messages": turns}) + "\n")
    assert datasets.import_file(studio, small).row is not None


def test_a_home_folder_on_a_full_disk_is_refused_in_words(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(MachineError, match="The disk is full"):
        make_studio(small_disk / "home")


# ---- the home folder --------------------------------------------------------------------------


def test_the_home_folder_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    home = Home(path=tmp_path / "a" / "home")
    home.create()
    home.create()
    folders = [home.path, *(path for path in home.path.rglob("*") if path.is_dir())]
    assert len(folders) > 7
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


def test_a_home_folder_that_cannot_be_made_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "home", Path("/proc/nowhere")):
        with pytest.raises(MachineError, match=f"cannot be written.*{path}"):
            Home(path=path).create()


def test_every_folder_knows_the_home_it_lies_in(tmp_path: Path) -> None:
    home = Home(path=tmp_path)
    assert home.run(42).home == home.merge(1).home == home.chat(7).home == home
    assert home.run(42).path.name == "000042"
    assert home.run(42).checkpoint(100).name == "step-000100"


# ---- locks ------------------------------------------------------------------------------------


def hold(path: Path, kind: str) -> subprocess.Popen[str]:
    """Start a process that takes a lock and keeps it until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_a_lock_is_seen_by_others_until_its_process_dies(tmp_path: Path) -> None:
    path = tmp_path / "worker.lock"
    assert not is_locked(path)
    with hold(path, "alone") as process:
        assert is_locked(path)
        assert take_lock(path) is None
        assert take_lock(path, shared=True) is None
        process.kill()
    assert not is_locked(path)


def test_a_shared_lock_lets_others_share_it_and_keeps_the_rest_out(tmp_path: Path) -> None:
    path = tmp_path / "clients.lock"
    with hold(path, "shared") as process:
        ours = take_lock(path, shared=True)
        assert ours is not None
        assert take_lock(path) is None
        process.kill()
        process.wait()
        assert is_locked(path)
        ours.close()
    assert not is_locked(path)


def test_asking_whether_a_file_is_locked_does_not_lock_it(tmp_path: Path) -> None:
    path = tmp_path / "worker.lock"
    assert [is_locked(path) for _ in range(3)] == [False] * 3
    lock = take_lock(path)
    assert lock is not None
    lock.close()
