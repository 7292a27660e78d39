"""Uploads: what arrives is what was sent, in one piece, and nothing is left behind."""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.errors import ConflictError, InputError, MachineError, NotFoundError
from studio.locks import take_lock
from studio.services import uploads
from studio.services.receiving import Receiver
from studio.services.studio import Studio
from studio.services.uploads import Upload
from studio.settings import Settings
from tests.fakes import make_studio

NAMES = [
    "a" * 255,
    "\U0001f600\U0001f469\u200d\U0001f680.jsonl",
    "\u05e9\u05dc\u05d5\u05dd\u202e.jsonl",
    "'; rm -rf ~; \".jsonl",
    "two\nlines.jsonl",
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\data.jsonl",
    "<script>alert(1)</script>",
    "",
]


def limited(studio: Studio, **settings: Any) -> Studio:
    return replace(studio, settings=Settings(home=studio.home.path, **settings))


def send(receiver: Receiver, upload: Upload, *blocks: bytes) -> Upload:
    writing = receiver.open(upload.id, upload.offset)
    for block in blocks:
        writing.write(block)
    return receiver.close(writing)


def aged(upload: Upload, seconds: float) -> None:
    past = time.time() - seconds
    for path in (*upload.path.parent.iterdir(), upload.path.parent):
        os.utime(path, (past, past))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_and_no_path(studio: Studio, name: str) -> None:
    upload = uploads.create(studio, name, 3)
    assert upload.name == name
    assert upload.path.parent.parent == studio.home.incoming
    assert set(upload.path.parent.parent.iterdir()) == {upload.path.parent}
    done = send(Receiver(studio), upload, b"abc")
    assert uploads.finished(studio, json.dumps([upload.id])) == [done]


@given(blocks=st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=8), data=st.data())
def test_however_it_is_cut_the_bytes_and_their_hash_arrive(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[bytes], data: st.DataObject
) -> None:
    studio = make_studio(tmp_path_factory.mktemp("home"))
    content = b"".join(blocks)
    receiver = Receiver(studio)
    upload = uploads.create(studio, "x", len(content))
    for block in blocks:
        assert not upload.is_finished
        if data.draw(st.booleans()):
            receiver = Receiver(studio)  # the studio was restarted
        upload = send(receiver, upload, block)
    assert upload.path.read_bytes() == content
    assert upload.sha256 == hashlib.sha256(content).hexdigest()


def test_one_request_writes_at_a_time(studio: Studio) -> None:
    receiver, upload = Receiver(studio), uploads.create(studio, "x", 6)
    writing = receiver.open(upload.id, 0)
    with pytest.raises(ConflictError, match="being written already"):
        receiver.open(upload.id, 0)
    with pytest.raises(ConflictError, match="being written already"):
        Receiver(studio).open(upload.id, 0)
    writing.write(b"abc")
    assert receiver.close(writing).offset == 3
    assert send(receiver, uploads.find(studio, upload.id), b"def").is_finished


@pytest.mark.parametrize("offset", [0, 2, 4, 99])
def test_a_wrong_offset_is_refused_and_releases_the_upload(studio: Studio, offset: int) -> None:
    receiver, upload = Receiver(studio), uploads.create(studio, "x", 6)
    upload = send(receiver, upload, b"abc")
    with pytest.raises(ConflictError, match=f"come to byte 3, not {offset}"):
        receiver.open(upload.id, offset)
    assert send(receiver, upload, b"def").sha256 == hashlib.sha256(b"abcdef").hexdigest()


def test_more_than_was_announced_is_not_kept(studio: Studio) -> None:
    receiver, upload = Receiver(studio), uploads.create(studio, "x", 4)
    writing = receiver.open(upload.id, 0)
    writing.write(b"abc")
    with pytest.raises(InputError, match="More bytes came than the 4"):
        writing.write(b"de")
    assert receiver.close(writing).path.read_bytes() == b"abc"


def test_a_finished_upload_takes_nothing_more(studio: Studio) -> None:
    receiver, upload = Receiver(studio), uploads.create(studio, "x", 1)
    done = send(receiver, upload, b"a")
    writing = receiver.open(upload.id, 1)
    with pytest.raises(InputError, match="More bytes"):
        writing.write(b"b")
    assert receiver.close(writing) == done


@pytest.mark.parametrize(
    ("size", "words"), [(0, "empty"), (11, "more than the 0.0 MiB that one file")]
)
def test_a_size_that_cannot_be_is_refused_before_a_byte_is_sent(
    studio: Studio, size: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        uploads.create(limited(studio, max_upload_bytes=10), "x", size)
    assert list(studio.home.incoming.iterdir()) == []


def test_a_name_that_never_ends_is_refused(studio: Studio) -> None:
    with pytest.raises(InputError, match="1025 characters"):
        uploads.create(studio, "x" * 1025, 1)


def test_room_stays_free_on_the_disk(studio: Studio) -> None:
    with pytest.raises(MachineError, match="GiB free"):
        uploads.create(limited(studio, min_free_bytes=2**60), "x", 1)
    upload = uploads.create(studio, "x", 3)
    receiver = Receiver(limited(studio, min_free_bytes=2**60))
    writing = receiver.open(upload.id, 0)
    with pytest.raises(MachineError, match="GiB free"):
        writing.write(b"abc")
    assert receiver.close(writing).offset == 0


def test_room_is_kept_for_what_other_uploads_announced(studio: Studio) -> None:
    vast = limited(studio, max_upload_bytes=2**62)
    free = os.statvfs(studio.home.path).f_bavail * os.statvfs(studio.home.path).f_frsize
    uploads.create(vast, "x", int(free * 0.6))
    with pytest.raises(MachineError, match="GiB free"):
        uploads.create(vast, "y", int(free * 0.6))


@pytest.mark.parametrize("upload_id", ["", "..", "../home", "0" * 32, "A" * 32, "0" * 31 + "/"])
def test_an_id_that_was_not_given_finds_nothing(studio: Studio, upload_id: str) -> None:
    for verb in (uploads.find, uploads.discard):
        with pytest.raises(NotFoundError, match="does not have this upload"):
            verb(studio, upload_id)


@pytest.mark.parametrize("text", ["{", "{}", "7", '"x"', "[1]", "[[]]", "null"])
def test_a_page_that_names_no_uploads_is_told(studio: Studio, text: str) -> None:
    with pytest.raises(InputError, match="named no uploads"):
        uploads.finished(studio, text)


def test_no_text_names_nothing(studio: Studio) -> None:
    assert uploads.finished(studio, "") == []


def test_half_an_upload_is_not_handed_on(studio: Studio) -> None:
    upload = send(Receiver(studio), uploads.create(studio, "x", 6), b"abc")
    with pytest.raises(InputError, match="3 of 6 bytes"):
        uploads.finished(studio, json.dumps([upload.id]))


def test_what_is_discarded_is_gone_even_while_it_is_written(studio: Studio) -> None:
    receiver, upload = Receiver(studio), uploads.create(studio, "x", 3)
    writing = receiver.open(upload.id, 0)
    uploads.discard(studio, upload.id)
    with pytest.raises((NotFoundError, MachineError)):
        writing.write(b"abc")
    with pytest.raises(NotFoundError):
        receiver.close(writing)
    assert list(studio.home.incoming.iterdir()) == []


def test_a_partial_is_swept_after_an_hour_and_not_before(studio: Studio) -> None:
    old, young = (uploads.create(studio, name, 6) for name in ("old", "young"))
    aged(old, 3700)
    aged(young, 3500)
    assert uploads.sweep(studio) == 1
    assert [entry.name for entry in studio.home.incoming.iterdir()] == [young.id]


def test_creating_one_sweeps_the_old(studio: Studio) -> None:
    aged(uploads.create(studio, "old", 6), 3700)
    new = uploads.create(studio, "new", 6)
    assert [entry.name for entry in studio.home.incoming.iterdir()] == [new.id]


def test_a_finished_one_is_kept_for_a_day(studio: Studio) -> None:
    upload = send(Receiver(studio), uploads.create(studio, "x", 3), b"abc")
    aged(upload, 80_000)
    assert uploads.sweep(studio) == 0
    assert uploads.sweep(studio, now=time.time() + 10_000) == 1
    assert list(studio.home.incoming.iterdir()) == []


def test_what_is_being_written_is_never_swept(studio: Studio) -> None:
    upload = uploads.create(studio, "x", 3)
    lock = take_lock(upload.path.parent / "lock")
    assert lock is not None
    with lock:
        assert uploads.sweep(studio, now=time.time() + 10**6) == 0
    assert uploads.sweep(studio, now=time.time() + 10**6) == 1


def test_what_killed_processes_left_is_swept_after_a_day(studio: Studio) -> None:
    folder = uploads.new_fetch_folder(studio)
    (folder / "download").write_bytes(b"x")
    (studio.home.incoming / "loose").write_bytes(b"x")
    assert uploads.sweep(studio) == 0
    assert uploads.sweep(studio, now=time.time() + 90_000) == 2
    assert list(studio.home.incoming.iterdir()) == []


def test_a_hash_is_computed_again_when_the_file_is_longer_than_what_was_hashed(
    studio: Studio,
) -> None:
    receiver, upload = Receiver(studio), uploads.create(studio, "x", 6)
    send(receiver, upload, b"ab")
    with uploads.find(studio, upload.id).path.open("ab") as file:
        file.write(b"cd")  # as when a write failed half-way
    done = send(receiver, uploads.find(studio, upload.id), b"ef")
    assert done.sha256 == hashlib.sha256(b"abcdef").hexdigest()


def test_files_of_uploads_are_their_owners_alone(studio: Studio) -> None:
    upload = uploads.create(studio, "x", 3)
    assert upload.path.stat().st_mode & 0o077 == 0
    assert upload.path.parent.stat().st_mode & 0o077 == 0


def test_the_rules_of_sources_are_the_settings(tmp_path: Path, studio: Studio) -> None:
    settings = Settings(
        home=studio.home.path, max_upload_bytes=5, server_path_roots=(tmp_path,), allow_http=True
    )
    rules = uploads.rules(replace(studio, settings=settings))
    assert (rules.max_bytes, rules.server_path_roots, rules.allow_http) == (5, (tmp_path,), True)
    assert (rules.allow_server_paths, rules.allow_private_urls) == (True, False)
