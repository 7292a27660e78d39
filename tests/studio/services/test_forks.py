"""Forks and clones: what goes on, what is refused, and that nothing is left half made."""

import contextlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from studio.domain.fork import Keep
from studio.domain.metrics import LOSS
from studio.domain.run import RunState
from studio.errors import ConflictError, InputError, NotFoundError
from studio.services import checkpoints, forks, queue, runs
from studio.services.studio import Studio
from studio.store.rows import RunRow
from tests.studio.queued import add_checkpoint, end, submit


@pytest.fixture
def parent(studio: Studio) -> int:
    """A finished Run with Checkpoints of the steps 4 and 8, and all that it measured."""
    number = submit(studio, train={"max_steps": 8})
    end(studio, number, RunState.FINISHED)
    add_checkpoint(studio, number, 4, loss=2.0)
    add_checkpoint(studio, number, 8, loss=2.5)
    with studio.database.write() as session:
        row = session.get_one(RunRow, number)
        row.step, row.total_steps = 8, 8
    folder = studio.home.run(number)
    lines = [
        json.dumps({"step": step, "total_steps": 8, "values": {"loss": 9.0 - step}})
        for step in range(1, 9)
    ]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 9, "to')
    sample = {"prompt": "p", "reply": "r", "is_cut": False}
    folder.samples.write_text("".join(json.dumps({"step": s, **sample}) + "\n" for s in (0, 4, 8)))
    return number


def fork(studio: Studio, parent: int, step: int, changes: Any = None, **more: Any) -> RunRow:
    spec = forks.changed_spec(studio, parent, changes or {})
    return forks.fork(studio, parent, step, spec, **more)


def left_over(studio: Studio) -> list[str]:
    return sorted(path.name for path in studio.home.runs.iterdir())


MORE = {"train": {"max_steps": 16}}


def test_a_fork_takes_the_checkpoint_and_all_that_was_measured_until_then(
    studio: Studio, parent: int
) -> None:
    row = fork(studio, parent, 4, {"optim": {"learning_rate": 1e-5}})
    folder = studio.home.run(row.id)
    assert (row.state, row.step) == (RunState.QUEUED, 4)
    assert (row.parent_id, row.parent_step, row.parent_keep) == (parent, 4, "everything")
    assert json.loads((folder.origin / "origin.json").read_text()) == {
        "run": parent,
        "step": 4,
        "keep": "everything",
    }
    there = studio.home.run(parent).checkpoint(4) / "tensors" / "model.safetensors"
    assert (folder.origin / "checkpoint" / "tensors" / "model.safetensors").samefile(there)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [
        1, 2, 3, 4,
    ]  # fmt: skip
    assert [json.loads(line)["step"] for line in folder.samples.read_text().splitlines()] == [0, 4]
    assert [point.value for point in runs.curves(studio, row.id, [LOSS])[LOSS]] == [8, 7, 6, 5]
    assert [event.text for event in runs.history(studio, row.id)] == [
        f"Forked from run {parent} at step 4: weights, optimizer and data order go on."
    ]


def test_a_fork_of_the_weights_begins_at_step_0_with_nothing_measured(
    studio: Studio, parent: int
) -> None:
    row = fork(studio, parent, 8, {"optim": {"optimizer": "adamw_8bit"}}, keep=Keep.WEIGHTS)
    folder = studio.home.run(row.id)
    assert (row.step, row.parent_keep) == (0, "weights")
    assert not folder.metrics.exists()
    assert (folder.origin / "checkpoint" / "state.json").exists()


def test_a_fork_outlives_the_checkpoint_that_it_came_from(studio: Studio, parent: int) -> None:
    row = fork(studio, parent, 4)
    shutil.rmtree(studio.home.run(parent).path)
    origin = studio.home.run(row.id).origin / "checkpoint"
    assert checkpoints.size_of(origin) is not None


@pytest.mark.parametrize(
    ("changes", "keep", "words"),
    [
        ({"model": {"id": "tiny/qwen3-next"}}, Keep.WEIGHTS, "Base model was tiny/qwen3.5"),
        ({"method": "lora"}, Keep.WEIGHTS, "Method was"),
        ({"lora": {"rank": 3}}, Keep.WEIGHTS, "Rank was .* now 3"),
        ({"lora": {"targets": ["attention"]}}, Keep.EVERYTHING, "LoRA targets was"),
        ({"train": {"max_steps": 4}}, Keep.EVERYTHING, "Nothing is left to train: step 4"),
    ],
)
def test_what_cannot_go_on_is_refused_in_words_and_leaves_nothing(
    studio: Studio, parent: int, changes: dict[str, Any], keep: Keep, words: str
) -> None:
    before = left_over(studio)
    with pytest.raises(InputError, match=words):
        fork(studio, parent, 4, changes, keep=keep)
    assert left_over(studio) == before
    assert len(runs.listing(studio)) == 1


def test_nothing_is_left_to_train_behind_the_last_step(studio: Studio, parent: int) -> None:
    with pytest.raises(InputError, match="step 8 is done, and the run has 8 steps"):
        fork(studio, parent, 8)
    assert fork(studio, parent, 8, MORE).step == 8


def test_a_step_without_a_checkpoint_names_those_that_are_there(
    studio: Studio, parent: int
) -> None:
    with pytest.raises(NotFoundError, match=r"no checkpoint of step 5.*those of step 8, 4"):
        fork(studio, parent, 5)
    fresh = submit(studio)
    with pytest.raises(NotFoundError, match=r"no checkpoint of step 5.*save one now"):
        fork(studio, fresh, 5)


def test_a_failure_between_folder_and_row_leaves_neither(
    studio: Studio, parent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = left_over(studio)
    monkeypatch.setattr(queue, "MAX_QUEUED", 0)
    with pytest.raises(ConflictError, match="queued"):
        fork(studio, parent, 4)
    monkeypatch.undo()
    stray = studio.home.run(parent + 1).path
    stray.mkdir()
    with pytest.raises(ConflictError, match="is there already"):
        fork(studio, parent, 4)
    stray.rmdir()
    assert left_over(studio) == before
    assert len(runs.listing(studio)) == 1
    assert fork(studio, parent, 4).id == parent + 1


def test_checkpoints_that_are_pruned_meanwhile_fork_whole_or_not_at_all(
    studio: Studio, parent: int
) -> None:
    """A trainer removes and saves Checkpoints while forks are made of them."""
    spec = forks.changed_spec(studio, parent, MORE)
    is_over = threading.Event()

    def prune() -> None:
        while not is_over.is_set():
            shutil.rmtree(studio.home.run(parent).checkpoint(4), ignore_errors=True)
            add_checkpoint(studio, parent, 4)

    pruning = threading.Thread(target=prune)
    pruning.start()
    made = []
    try:
        for _ in range(40):
            with contextlib.suppress(NotFoundError):
                made.append(forks.fork(studio, parent, 4, spec).id)
    finally:
        is_over.set()
        pruning.join()
    for number in made:
        assert checkpoints.size_of(studio.home.run(number).origin / "checkpoint") is not None
    assert not [name for name in left_over(studio) if name.startswith(".")]


def test_checkpoints_are_listed_newest_first_and_the_best_is_marked(
    studio: Studio, parent: int
) -> None:
    broken = add_checkpoint(studio, parent, 12, loss=0.1)
    (broken / "state.json").unlink()
    (studio.home.run(parent).checkpoints / "step-odd").mkdir()
    found = checkpoints.listing(studio, parent)
    assert [(one.step, one.evaluation_loss, one.is_best) for one in found] == [
        (8, 2.5, False),
        (4, 2.0, True),
    ]
    assert all(one.size_bytes > 1000 for one in found)


def test_lineage_goes_up_and_down(studio: Studio, parent: int) -> None:
    child = fork(studio, parent, 4).id
    add_checkpoint(studio, child, 6)
    grandchild = fork(studio, child, 6).id
    found = forks.lineage_of(studio, child)
    assert [row.id for row in found.parents] == [parent]
    assert [row.id for row in found.children] == [grandchild]
    assert [row.id for row in forks.lineage_of(studio, grandchild).parents] == [child, parent]


def test_differences_call_datasets_by_their_names(studio: Studio, parent: int) -> None:
    before = runs.spec_of(runs.get(studio, parent))
    changes = {"data": {"dataset": "other"}, "optim": {"learning_rate": 1e-5}}
    after = forks.changed_spec(studio, parent, changes)
    found = [(one.key, one.old, one.new) for one in forks.differences(studio, before, after)]
    assert found == [
        ("data.dataset", "tidemark-support", "other"),
        ("optim.learning_rate", f"{before.optim.learning_rate:g}", "1e-05"),
    ]


def test_a_checkpoint_on_another_disk_is_copied(
    studio: Studio, parent: int, tmp_path: Path
) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one disk")
    away = other / f"{tmp_path.parent.name}-{tmp_path.name}"
    folder = studio.home.run(parent).checkpoint(4)
    shutil.copytree(folder, away)
    shutil.rmtree(folder)
    folder.symlink_to(away, target_is_directory=True)
    try:
        row = fork(studio, parent, 4)
    finally:
        shutil.rmtree(away)
    assert checkpoints.size_of(studio.home.run(row.id).origin / "checkpoint") is not None
