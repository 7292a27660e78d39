"""The exit code of a command that waited for a run which failed."""

from types import SimpleNamespace

import pytest
import typer

from studio.domain.run import RunState
from studio.run_commands import exit_if_failed


@pytest.mark.parametrize(
    ("kind", "field", "code"),
    [
        ("InputError", "", 2),
        ("NotFoundError", "", 2),
        ("ConflictError", "", 2),
        ("MachineError", "", 2),
        ("EngineError", "train.num_gpus", 2),
        ("EngineError", "", 1),
        ("Unexplained", "", 1),
        ("KeyError", "", 1),
    ],
)
def test_what_the_user_can_mend_exits_2(kind: str, field: str, code: int) -> None:
    error = {"type": kind, "message": "It failed.", "hint": "", "field": field}
    with pytest.raises(typer.Exit) as left:
        exit_if_failed(SimpleNamespace(state=RunState.FAILED, error=error))
    assert left.value.exit_code == code


def test_runs_of_an_older_studio_name_no_field() -> None:
    error = {"type": "EngineError", "message": "It failed.", "hint": ""}
    with pytest.raises(typer.Exit) as left:
        exit_if_failed(SimpleNamespace(state=RunState.FAILED, error=error))
    assert left.value.exit_code == 1


def test_a_run_that_did_not_fail_exits_0() -> None:
    exit_if_failed(SimpleNamespace(state=RunState.FINISHED, error=None))
