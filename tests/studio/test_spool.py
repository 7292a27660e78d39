"""The folder of messages: whole, in order, taken once, and given back by the dead."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from studio.errors import MachineError
from studio.spool import MAX_DEAD, MAX_MESSAGE_BYTES, Spool

TAKER = (
    "import sys, time; from pathlib import Path; from studio.spool import Spool; "
    "spool = Spool(Path(sys.argv[1])); "
    "print(*[spool.take(name) for name in spool.waiting('q')], flush=True); time.sleep(600)"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "broker"


def names(folder: Path, part: str) -> list[str]:
    return sorted(path.name for path in (folder / part).iterdir())


def take(spool: Spool) -> str:
    taken = spool.take(spool.waiting("q")[0])
    assert taken is not None
    return taken


def test_messages_come_out_in_the_order_in_which_they_went_in(folder: Path) -> None:
    spool = Spool(folder)
    for number in range(50):
        spool.put("q", str(number))
    taken = [spool.take(name) for name in spool.waiting("q")]
    assert [int(spool.read(str(name))) for name in taken] == list(range(50))
    spool.close()


def test_a_message_that_was_given_back_is_the_oldest_again(folder: Path) -> None:
    spool = Spool(folder)
    spool.put("q", "first")
    spool.put("q", "second")
    spool.give_back(take(spool))
    assert spool.read(take(spool)) == b"first"
    spool.close()


def test_a_queue_does_not_see_the_messages_of_another(folder: Path) -> None:
    spool = Spool(folder)
    spool.put("q", "mine")
    spool.put("other", "not mine")
    assert len(spool.waiting("q")) == 1


def test_of_many_who_take_each_message_goes_to_one(folder: Path) -> None:
    spool = Spool(folder)
    for _ in range(200):
        spool.put("q", "")
    won: list[list[str]] = [[], [], [], []]

    def run(index: int) -> None:
        mine = Spool(folder)
        won[index] += [name for name in mine.waiting("q") if mine.take(name) is not None]
        mine.close()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [name for part in won for name in part]
    assert len(everything) == len(set(everything)) == 200


def test_what_a_killed_process_had_taken_waits_again_and_what_a_live_one_has_does_not(
    folder: Path,
) -> None:
    spool = Spool(folder)
    spool.put("q", "held by a living process")
    mine = take(spool)
    for _ in range(3):
        spool.put("q", "")
    with subprocess.Popen(
        [sys.executable, "-c", TAKER, str(folder)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert len(other.stdout.readline().split()) == 3
        assert spool.restore() == 0
        other.kill()
    assert spool.restore() == 3
    assert len(spool.waiting("q")) == 3
    assert names(folder, "inflight") == [mine]
    assert len(names(folder, "owners")) == 1
    spool.close()


def test_an_owner_that_ends_in_order_leaves_what_it_has_to_everyone(folder: Path) -> None:
    first, second = Spool(folder), Spool(folder)
    first.put("q", "")
    take(first)
    first.close()
    assert second.restore() == 1
    assert names(folder, "owners") == []


def test_folders_that_somebody_removes_are_made_again_for_their_owner_only(folder: Path) -> None:
    spool = Spool(folder)
    spool.put("q", "lost")
    lost = take(spool)
    for part in sorted(folder.iterdir()):
        for file in part.iterdir():
            file.unlink()
        part.rmdir()
    folder.rmdir()
    assert spool.waiting("q") == []
    assert [part.stat().st_mode & 0o077 for part in (folder, *folder.iterdir())] == [0] * 5
    spool.finish(lost)
    spool.put("q", "kept")
    kept = take(spool)
    # The old owner's file is gone, and with it the proof that it lives: it has a new name.
    assert kept.partition("@")[0] != lost.partition("@")[0]
    assert Spool(folder).restore() == 0
    assert names(folder, "inflight") == [kept]
    spool.close()


def test_what_cannot_be_read_is_kept_by_name_and_only_the_newest(folder: Path) -> None:
    spool = Spool(folder)
    for number in range(MAX_DEAD + 5):
        spool.put("q", str(number))
        name = spool.waiting("q")[0]
        spool.bury(take(spool))
        assert names(folder, "dead")[-1].endswith(name)
    kept = [int((folder / "dead" / name).read_text()) for name in names(folder, "dead")]
    assert kept == list(range(5, MAX_DEAD + 5))
    spool.close()


def test_a_folder_among_the_dead_is_removed_in_its_turn(folder: Path) -> None:
    spool = Spool(folder)
    spool.create()
    (folder / "queue" / "0_a.q.msg").mkdir()
    (folder / "queue" / "0_a.q.msg" / "inside").touch()
    for _ in range(MAX_DEAD + 1):
        spool.bury(take(spool))
        spool.put("q", "")
    assert all((folder / "dead" / name).is_file() for name in names(folder, "dead"))
    spool.close()


@pytest.mark.parametrize("kind", ["folder", "large", "link"])
def test_what_is_no_small_file_is_not_read(folder: Path, kind: str) -> None:
    spool = Spool(folder)
    spool.create()
    path = folder / "queue" / "0_a.q.msg"
    if kind == "folder":
        path.mkdir()
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(MAX_MESSAGE_BYTES + 1)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="no file of at most"):
        spool.read(take(spool))
    spool.close()


def test_names_that_no_message_has_are_left_alone(folder: Path) -> None:
    spool = Spool(folder)
    spool.create()
    long = "0" * 245 + ".q.msg"
    for name in (long, ".0_half.q.msg.x1y2", "notes.txt", "q.msg"):
        (folder / "queue" / name).touch()
    assert spool.waiting("q") == []


def test_a_message_that_another_one_took_is_not_taken_twice(folder: Path) -> None:
    spool = Spool(folder)
    spool.put("q", "")
    name = spool.waiting("q")[0]
    assert spool.take(name) is not None
    assert spool.take(name) is None
    spool.close()


def test_where_nothing_lies_above_it_the_folder_is_not_made(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "gone" / "broker")
    with pytest.raises((OSError, MachineError)):
        spool.put("q", "")
    assert not (tmp_path / "gone").exists()
