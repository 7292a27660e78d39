"""`studio queue ...` and the commands on Runs that need no worker, as a person types them."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from studio.__main__ import app
from studio.domain.run import RunState
from studio.errors import StudioError
from studio.run_commands import parse_changes
from studio.services import runs
from studio.services.studio import Studio
from tests.studio.queued import add_checkpoint, add_worker, card, end, start, submit


def say(studio: Studio, *arguments: str) -> str:
    home = ("--home", str(studio.home.path))
    done = CliRunner().invoke(app, [*arguments, *home], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def values(studio: Studio, *arguments: str) -> Any:
    return json.loads(say(studio, *arguments, "--json"))


def refusal(studio: Studio, *arguments: str) -> str:
    with pytest.raises(StudioError) as caught:
        say(studio, *arguments)
    return str(caught.value)


def waiting(studio: Studio, *arguments: str) -> list[int]:
    return [row["id"] for row in values(studio, "queue", *arguments)["waiting"]]


def test_the_order_is_changed_and_shown(studio: Studio) -> None:
    one, two, three = (submit(studio) for _ in range(3))
    assert waiting(studio) == [one, two, three]
    assert waiting(studio, "move", str(three), "--first") == [three, one, two]
    assert waiting(studio, "move", str(two), "--before", str(one)) == [three, two, one]
    assert waiting(studio, "priority", str(one), "7") == [one, three, two]
    assert waiting(studio, "priority", str(one), "-7") == [three, two, one]
    assert "Give --first, or --before" in refusal(studio, "queue", "move", str(one))
    assert "out of range" in refusal(studio, "queue", "priority", str(one), "700")


def test_what_waits_says_why(studio: Studio) -> None:
    add_worker(studio, "desk", card(0))
    one, two = submit(studio), submit(studio)
    say(studio, "queue", "hold", str(one))
    say(studio, "queue", "start-after", str(two), "--run", str(one))
    shown = say(studio, "queue")
    assert "paused by you" in shown
    assert f"waits for run {one} (paused)" in shown
    assert "worker desk: 1 GPU, 0 in use, waits for work" in shown
    say(studio, "queue", "release", str(one))
    say(studio, "queue", "start-after", str(two), "--clear")
    found = values(studio, "queue", "start-after", str(two), "+8h")
    assert found["waiting"][1]["why"].startswith("starts at ")
    assert "'soon' is no time" in refusal(studio, "queue", "start-after", str(two), "soon")
    assert "Give a TIME" in refusal(studio, "queue", "start-after", str(two))


def test_the_queue_is_paused_as_a_whole(studio: Studio) -> None:
    submit(studio)
    assert "the queue is paused" in say(studio, "queue", "pause")
    assert not values(studio, "queue", "resume")["is_paused"]


def test_a_run_is_paused_saved_and_evaluated(studio: Studio) -> None:
    number = str(submit(studio, data={"eval_share": 0.1}))
    assert say(studio, "pause", number) == f"run {number} is PAUSED\n"
    assert values(studio, "runs")[0]["is_paused"]
    assert "is PAUSED. Only a running run" in refusal(studio, "save-now", number)
    say(studio, "queue", "release", number)
    start(studio, int(number))
    assert "saves a checkpoint at its next step" in say(studio, "save-now", number)
    assert "evaluates at its next step" in say(studio, "evaluate-now", number)
    assert values(studio, "pause", number)["state"] == "STOPPING"


def test_history_and_checkpoints_are_listed(studio: Studio) -> None:
    number = submit(studio)
    end(studio, number, RunState.FINISHED)
    add_checkpoint(studio, number, 4, loss=2.0)
    add_checkpoint(studio, number, 8, loss=2.5)
    assert [event["kind"] for event in values(studio, "history", str(number))] == ["queued"]
    assert "You launched it." in say(studio, "history", str(number))
    found = values(studio, "checkpoints", str(number))
    assert [(one["step"], one["is_best"]) for one in found] == [(8, False), (4, True)]
    assert "2.0000" in say(studio, "checkpoints", str(number))


def test_differences_are_told_before_anything_is_launched(studio: Studio) -> None:
    one, two = submit(studio), submit(studio, train={"max_steps": 9})
    found = values(studio, "diff", str(one), str(two))
    assert [(c["field"], c["old"], c["new"]) for c in found] == [("train.max_steps", "empty", "9")]
    changes = ("--set", "optim.learning_rate=1e-5", "--set", "lora.targets=[attention]")
    shown = say(studio, "diff", str(one), *changes)
    assert "optim.learning_rate:" in shown
    assert "-> attention\n" in shown
    assert say(studio, "diff", str(one)) == "nothing is different\n"
    assert len(runs.listing(studio)) == 2


def test_a_change_is_a_field_and_a_value() -> None:
    pairs = ["train.max_steps=null", "lora.targets=[attention, router]", "name= a = b "]
    assert parse_changes(pairs) == {
        "train": {"max_steps": None},
        "lora": {"targets": ["attention", "router"]},
        "name": "a = b",
    }
    for wrong in ("learning_rate", "=3", "lora.targets=[attention"):
        with pytest.raises(StudioError):
            parse_changes([wrong])


def test_unknown_runs_are_refused_in_words(studio: Studio) -> None:
    for command in ("pause", "save-now", "evaluate-now", "checkpoints", "history", "diff", "clone"):
        assert "There is no run 9." in refusal(studio, command, "9")
    assert "There is no run 9." in refusal(studio, "fork", "9", "--step", "1")
