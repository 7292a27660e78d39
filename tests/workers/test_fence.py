"""Who may write into a run folder."""

from pathlib import Path

import pytest

from studio.disk import RunFolder
from studio.domain.outcome import ExitCode
from workers.fence import MARK, FencedError, fence_of

OURS, THEIRS = "runs:7:3:worker-a", "runs:7:4:worker-b"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(path=tmp_path)


@pytest.mark.parametrize(
    ("mark", "owner", "is_lost"),
    [
        (OURS, f"{OURS}\n", False),
        (OURS, THEIRS, True),
        (OURS, None, False),
        (OURS, "", False),
        ("", THEIRS, False),
    ],
)
def test_a_mark_counts_only_beside_another_one(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, mark: str, owner: str | None, is_lost: bool
) -> None:
    monkeypatch.setenv(MARK, mark)
    if owner is not None:
        run.owner.write_text(owner)
    assert fence_of(run).is_lost() is is_lost


def test_whoever_lost_the_run_is_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, OURS)
    fence = fence_of(run)
    fence.check()
    run.owner.write_text(THEIRS)
    with pytest.raises(FencedError) as caught:
        fence.check()
    assert caught.value.code == ExitCode.FENCED


@pytest.mark.parametrize(("mark", "epoch"), [(OURS, 3), ("", 0), ("runs:7", 0), ("a:b:c:d", 0)])
def test_the_epoch_stands_in_the_mark(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, mark: str, epoch: int
) -> None:
    monkeypatch.setenv(MARK, mark)
    assert fence_of(run).epoch == epoch
