"""The launcher: what a child gets, how it ends, and that nothing of it is left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from studio.disk import Home
from studio.domain.spec import JobSpec, parse_spec
from studio.errors import InputError
from workers import launcher

# Writes its number to argv[1], then sleeps in a session of its own; its parent is gone by then.
GRANDCHILD = (
    "import os, sys, time\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "        open(sys.argv[1] + '.part', 'w').write(str(os.getpid()))\n"
    "        os.rename(sys.argv[1] + '.part', sys.argv[1])\n"
    "        time.sleep(600)\n"
    "    os._exit(0)\n"
    "os.wait()\n"
)
SLEEP = "import time; time.sleep(600)"
SHOW = "import json, sys; print(json.dumps(sys.argv[1:]))"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def mark_for(tmp_path: Path) -> str:
    return f"test:{tmp_path}:1"


# ---- what a child gets ------------------------------------------------------------------------


def test_a_child_gets_the_mark_and_none_of_our_own_settings() -> None:
    parent = {"STUDIO_HOME": "/h", "STUDIO_RUN": "other", "STUDIO_PORT": "1", "PATH": "/bin"}
    child = launcher.child_environment(parent, mark="runs:1:2", threads=3)
    assert {k: v for k, v in child.items() if k.startswith("STUDIO_")} == {"STUDIO_RUN": "runs:1:2"}
    assert child["PATH"] == "/bin"


def test_a_child_gets_the_threads_that_are_asked_for_and_waits_quietly() -> None:
    child = launcher.child_environment({"OMP_NUM_THREADS": "99"}, mark="m", threads=3)
    assert child["OMP_NUM_THREADS"] == "3"
    assert child["GOMP_SPINCOUNT"] == "10000"


def test_without_a_wish_a_child_gets_at_most_the_cores_there_are() -> None:
    child = launcher.child_environment({}, mark="m", threads=0)
    assert 1 <= int(child["OMP_NUM_THREADS"]) <= len(os.sched_getaffinity(0))


def test_a_child_finds_the_packages_and_keeps_the_paths_it_had() -> None:
    child = launcher.child_environment({"PYTHONPATH": "/mine"}, mark="m", threads=1)
    root, *others = child["PYTHONPATH"].split(os.pathsep)
    assert (Path(root) / "workers").is_dir()
    assert others == ["/mine"]


def test_a_trainer_has_one_rank_a_card_and_one_on_a_cpu() -> None:
    ranks = {gpus: launcher.trainer_command(Path("/r"), gpus, "m")[4] for gpus in (0, 1, 8)}
    assert ranks == {0: "--nproc-per-node=1", 1: "--nproc-per-node=1", 8: "--nproc-per-node=8"}


# ---- launch -----------------------------------------------------------------------------------


def test_a_child_leads_its_own_session_and_its_output_is_in_the_log(tmp_path: Path) -> None:
    code = (
        "import os, sys; print(os.getsid(0) == os.getpid(), os.getcwd(), flush=True); "
        "print('to stderr', file=sys.stderr); print(repr(sys.stdin.read()))"
    )
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    process = launcher.launch(python(code), mark="m", log=log)
    assert process.wait(60) == 0
    assert log.read_text().splitlines() == ["before", f"True {tmp_path}", "to stderr", "''"]


def test_arguments_reach_the_child_letter_by_letter(tmp_path: Path) -> None:
    odd = ["$(touch x)", "; rm -rf *", "`id`", "a b", "'\"", "*", "", "\n", "--", "ü"]
    log = tmp_path / "log.txt"
    process = launcher.launch(python(SHOW, *odd), mark="m", log=log)
    assert process.wait(60) == 0
    assert json.loads(log.read_text()) == odd
    assert list(tmp_path.iterdir()) == [log]


# ---- marks ------------------------------------------------------------------------------------


def test_a_grandchild_in_another_session_without_its_parent_is_found_and_killed(
    tmp_path: Path,
) -> None:
    number = tmp_path / "pid"
    process = launcher.launch(
        python(GRANDCHILD, str(number)), mark=mark_for(tmp_path), log=tmp_path / "log.txt"
    )
    assert process.wait(60) == 0
    wait_until(number.exists)
    pid = int(number.read_text())
    assert os.getsid(pid) != process.pid
    assert launcher.kill_marked(mark_for(tmp_path)) == [pid]
    assert is_gone(pid)
    assert launcher.kill_marked(mark_for(tmp_path)) == []


def test_only_the_very_mark_is_killed(tmp_path: Path) -> None:
    mark = mark_for(tmp_path)
    other = launcher.launch(python(SLEEP), mark=f"{mark}0", log=tmp_path / "log.txt")
    wait_until(lambda: list(launcher.marked(f"{mark}0")) == [other.pid])
    assert launcher.kill_marked(mark) == []
    assert other.poll() is None
    launcher.kill(other, f"{mark}0")
    assert other.returncode == -signal.SIGKILL


def test_killing_a_process_takes_its_descendants_along(tmp_path: Path) -> None:
    number = tmp_path / "pid"
    process = launcher.launch(
        python(GRANDCHILD + "time.sleep(600)", str(number)),
        mark=mark_for(tmp_path),
        log=tmp_path / "log.txt",
    )
    wait_until(number.exists)
    launcher.kill(process, mark_for(tmp_path))
    assert is_gone(int(number.read_text()))
    assert process.returncode == -signal.SIGKILL


def test_asking_a_process_that_has_ended_does_nothing(tmp_path: Path) -> None:
    process = launcher.launch(python("pass"), mark="m", log=tmp_path / "log.txt")
    assert process.wait(60) == 0
    launcher.ask_to_stop(process)
    assert process.returncode == 0


def test_asking_to_stop_is_a_signal_that_a_process_can_heed() -> None:
    process = subprocess.Popen(["sleep", "600"])
    launcher.ask_to_stop(process)
    assert process.wait(60) == -signal.SIGTERM


# ---- how it ended -----------------------------------------------------------------------------

WORDS = {"type": "InputError", "message": "The learning rate is wrong.", "hint": "Lower it."}
RESULT = {"state": "FINISHED", "step": 3}


@pytest.mark.parametrize("code", [0, 1, 64, -signal.SIGTERM, -signal.SIGKILL])
def test_a_result_file_tells_more_than_the_exit_code(tmp_path: Path, code: int) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    how = launcher.outcome(code, result=tmp_path / "result.json", error=tmp_path / "error.json")
    assert (how.exit_code, how.result, how.error) == (code, RESULT, None)
    assert not how.is_unexplained


@pytest.mark.parametrize("with_result", [False, True])
@pytest.mark.parametrize("code", [0, 1, 64, -signal.SIGKILL])
def test_an_error_file_is_always_told(tmp_path: Path, code: int, with_result: bool) -> None:
    (tmp_path / "error.json").write_text(json.dumps(WORDS))
    if with_result:
        (tmp_path / "result.json").write_text(json.dumps(RESULT))
    how = launcher.outcome(code, result=tmp_path / "result.json", error=tmp_path / "error.json")
    assert how.error == WORDS
    assert not how.is_unexplained


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGKILL, "killed by the system, most often for want of memory"),
        (-signal.SIGSEGV, f"ended with code -{signal.SIGSEGV:d} and did not say why"),
        (1, "ended with code 1 and did not say why"),
        (0, "ended with code 0 and did not say why"),
    ],
)
def test_without_any_file_the_exit_code_becomes_a_sentence(
    tmp_path: Path, code: int, words: str
) -> None:
    how = launcher.outcome(code, result=tmp_path / "result.json", error=tmp_path / "error.json")
    assert how.result is None
    assert how.error is not None
    assert words in how.error["message"]
    assert how.error["hint"]
    assert how.is_unexplained


# ---- the run folder ---------------------------------------------------------------------------


def data_spec(**data: object) -> JobSpec:
    return parse_spec({"data": data})


def test_a_run_folder_links_every_dataset_by_its_hash(tmp_path: Path) -> None:
    home = Home(path=tmp_path / "home")
    home.create()
    names = [letter * 64 for letter in "abc"]
    for name in names:
        home.dataset(name).write_text(f"{name}\n")
    spec = data_spec(
        dataset=names[0], mixture=[{"dataset": names[1], "weight": 2}], eval_dataset=names[2]
    )
    run = home.run(1)
    run.path.mkdir()
    run.error.write_text("{}")
    for _ in range(2):  # a second attempt finds what the first has left
        launcher.prepare_run(run, spec)
    assert sorted(path.name for path in run.datasets.iterdir()) == [f"{n}.jsonl" for n in names]
    assert all(run.dataset_of(name).read_text() == f"{name}\n" for name in names)
    assert run.dataset.read_text() == f"{names[0]}\n"
    assert run.dataset_of("") == run.dataset == run.dataset_of("d" * 64)
    assert parse_spec(json.loads(run.spec.read_text())) == spec
    assert not run.error.exists()
    # The home folder can be moved as a whole.
    moved = Home(path=home.path.rename(tmp_path / "moved"))
    assert moved.run(1).dataset_of(names[1]).read_text() == f"{names[1]}\n"


def test_a_dataset_that_is_gone_is_a_sentence(tmp_path: Path) -> None:
    home = Home(path=tmp_path / "home")
    home.create()
    home.dataset("a" * 64).write_text("{}\n")
    with pytest.raises(InputError, match="The file of the run's dataset is gone"):
        launcher.prepare_run(home.run(1), data_spec(dataset="a" * 64, eval_dataset="b" * 64))
