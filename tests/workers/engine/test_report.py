"""What rank 0 writes survives whatever an earlier attempt has left half done."""

import json
from pathlib import Path

import pytest

from studio.disk import RunFolder
from workers.engine.report import Reporter
from workers.fence import MARK

LINES = "".join(f'{{"step": {n}, "total_steps": 4, "values": {{}}}}\n' for n in (1, 2, 3))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(path=tmp_path)


@pytest.mark.parametrize("rest", ['{"step": 4, "tot', '{"step": 4, "total_steps": 4', "\x00\x00\n"])
def test_half_a_line_is_dropped(run: RunFolder, rest: str) -> None:
    run.metrics.write_text(LINES + rest)
    Reporter(run).go_on(3)
    assert run.metrics.read_text() == LINES


def test_damage_inside_loses_no_other_line(run: RunFolder) -> None:
    first, second, third = LINES.splitlines(keepends=True)
    run.metrics.write_bytes(first.encode() + b"\xff\xfe}\n[1]\n{}\n" + second.encode())
    Reporter(run).go_on(3)
    assert run.metrics.read_text() == first + second
    assert third not in run.metrics.read_text()


def test_a_file_that_holds_nothing_to_drop_is_left_as_it_is(run: RunFolder) -> None:
    run.metrics.write_text(LINES)
    before = run.metrics.stat().st_ino
    Reporter(run).go_on(3)
    assert run.metrics.stat().st_ino == before
    Reporter(run).go_on(2)
    assert run.metrics.stat().st_ino != before


def test_events_are_whole_lines_behind_half_a_one(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, "runs:3:5:me")
    run.events.write_text('{"at": 1')
    report = Reporter(run)
    report.event("began", 0, "Begins anew.")
    report.passed_over(7, "state.json is missing")
    lines = run.events.read_text().splitlines()
    assert lines[0] == '{"at": 1'
    first, second = (json.loads(line) for line in lines[1:])
    assert set(first) == {"at", "epoch", "kind", "step", "text"}
    assert (first["epoch"], first["kind"], first["step"]) == (5, "began", 0)
    assert second["text"] == "The Checkpoint of step 7 was passed over: state.json is missing."


def test_nothing_is_written_by_other_ranks_or_for_another_owner(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, "runs:3:5:me")
    run.metrics.write_text(LINES)
    run.result.write_text("theirs")
    run.owner.write_text("runs:3:6:you")
    for report in (Reporter(run), Reporter(run, speaks=False)):
        report.begin()
        report.go_on(0)
        report.stage("training")
        report.step(4, 4, {"loss": 1.0})
        report.event("saved", 4, "Saved.")
        report.proofs([])
        report.samples([])
    names = {path.name for path in run.path.iterdir()}
    assert names == {"metrics.jsonl", "result.json", "owner.txt"}
    assert run.metrics.read_text() == LINES
