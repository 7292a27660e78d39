"""Following metrics.jsonl: no record is lost, doubled or torn, however the bytes arrive."""

import logging
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.domain.metrics import Point, StepRecord
from workers.follow import Follower, points


def record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(step=step, total_steps=100, values={"loss": loss})


def line(of: StepRecord) -> bytes:
    return of.model_dump_json().encode() + b"\n"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_before_the_file_exists_there_is_nothing(tmp_path: Path) -> None:
    assert Follower(tmp_path / "metrics.jsonl").read() == []


def test_each_record_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    append(path, line(record(1)) + line(record(2)))
    assert follower.read() == [record(1), record(2)]
    assert follower.read() == []
    append(path, line(record(3)))
    assert follower.read() == [record(3)]


def test_half_a_line_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    whole = line(record(2))
    append(path, line(record(1)) + whole[:9])
    assert follower.read() == [record(1)]
    assert follower.read() == []
    append(path, whole[9:])
    assert follower.read() == [record(2)]


@pytest.mark.parametrize(
    "garbage",
    [b'{"step": 1, "tot\n', b"\n", b"\xff\x00\xfe\n", b"[]\n", b'{"step": 0}\n', b"null\n"],
)
def test_a_line_that_is_no_record_is_logged_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, line(record(1)) + garbage + line(record(2)))
    with caplog.at_level(logging.ERROR):
        assert Follower(path).read() == [record(1), record(2)]
    assert [entry.getMessage().split(": ")[0] for entry in caplog.records] == [
        f"{path} holds a line that is no record"
    ]


@settings(deadline=None, max_examples=60)
@given(
    losses=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=8),
    cuts=st.lists(st.integers(min_value=0, max_value=600), max_size=12),
)
def test_any_split_of_the_bytes_gives_the_same_records(
    losses: list[float], cuts: list[int]
) -> None:
    written = [record(number, loss) for number, loss in enumerate(losses, start=1)]
    whole = b"".join(map(line, written))
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        follower, found = Follower(path), list[StepRecord]()
        for begin, end in pairwise(edges):
            append(path, whole[begin:end])
            found.extend(follower.read())
    assert found == written


def test_every_value_of_a_record_becomes_a_point() -> None:
    two = StepRecord(step=4, total_steps=9, values={"loss": 2.0, "grad_norm": 0.5})
    assert points([two, record(5)]) == [
        Point(step=4, name="loss", value=2.0),
        Point(step=4, name="grad_norm", value=0.5),
        Point(step=5, name="loss", value=1.0),
    ]
