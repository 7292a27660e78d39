"""The main job from the command line, and what bad input is answered with."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from studio.disk import TEMPLATES, Home
from tests.e2e.conftest import end_worker
from tests.e2e.forks import Forks
from tests.e2e.shell import WRONG_INPUT, Shell
from tests.fakes import make_home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLE = TEMPLATES / "data" / "tidemark-support.jsonl"
OUR_FAULT = 1
LOOK_SECONDS = 0.3


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, verdicts: Path) -> Iterator[Shell]:
    home = make_home(tmp_path_factory.mktemp("cli-home"), verdicts)
    with Forks(tmp_path_factory.mktemp("cli-output")) as forks:
        yield Shell(home.path, forks)
    end_worker(home)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Shell]:
    """Commands that start from nothing, in a home folder that does not exist yet."""
    home = tmp_path / "fresh"
    yield Shell(home)
    end_worker(Home(path=home))


def test_main_job_from_the_command_line(fresh: Shell, tmp_path: Path) -> None:
    shell = fresh
    checked = shell.values("dataset", "check", str(EXAMPLE))
    assert (checked["num_conversations"], checked["num_errors"]) == (200, 0)
    added = shell.values("dataset", "add", str(EXAMPLE), "--name", "desk")
    assert added["num_conversations"] == 200
    assert [row["name"] for row in shell.values("dataset", "list")] == ["desk"]
    spec = tmp_path / "spec.yaml"
    spec.write_text("preset: tiny-qwen3.5\ndata: {dataset: desk}\ntrain: {max_steps: 4}\n")
    run = shell.values("run", str(spec), "--wait")
    assert (run["state"], run["step"]) == ("FINISHED", 4)
    proofs = {proof["name"]: proof["passed"] for proof in shell.values("show", "1")["proofs"]}
    assert proofs["targets"]
    assert proofs["mask"]
    assert proofs["coverage"]
    assert [row["id"] for row in shell.values("runs")] == [1]
    merge = shell.values("merge", "1", "--wait")
    assert (merge["state"], merge["certificate_passed"]) == ("FINISHED", True)
    assert (Path(merge["folder"]) / "model.safetensors").exists()
    question = ("-m", "How long is the Tidemark warranty?", "--max-tokens", "6")
    tuned = shell.values("chat", "1", *question)
    base = shell.values("chat", "1", *question, "--base")
    assert (tuned["model"], base["model"]) == ("tuned", "base")
    assert "already" in shell.refusal("stop", "1")


def test_a_dataset_from_check_to_figures(shell: Shell, tmp_path: Path) -> None:
    file, rejects = tmp_path / "chats.jsonl", tmp_path / "rejects.jsonl"
    good = '{"messages": [{"role": "user", "content": "Ebb?"}, {"role": "assistant", "content": "No."}]}'
    file.write_text(f'{good}\n{{"messages": []}}\n')
    checked = shell.run("dataset", "check", str(file), "--json", "--rejects", str(rejects))
    report = json.loads(checked.stdout)
    assert checked.returncode == WRONG_INPUT
    assert (report["num_conversations"], report["num_rejected"]) == (1, 1)
    assert [json.loads(line)["line"] for line in rejects.read_text().splitlines()] == [2]
    assert "keep the 1 good with --drop-rejected" in shell.refusal("dataset", "add", str(file))
    added = shell.values("dataset", "add", str(file), "--drop-rejected")
    assert (added["name"], added["num_conversations"], added["is_new"]) == ("chats", 1, True)
    seen = shell.values("dataset", "show", "chats", "--model", "tiny/qwen3-next")
    learned = [p["texts"] for p in seen["examples"][0]["pieces"] if p["supervised"]]
    assert "".join(text for texts in learned for text in texts) == "No.<|im_end|>"
    assert "No." in shell.run("dataset", "show", "chats", "--set", "thinking=mask").stdout
    figures = shell.values("dataset", "stats", "chats", "--set", "max_length_tokens=16")
    assert figures["conversations"] == 1
    assert figures["tokens"] == seen["examples"][0]["tokens"] + 4  # an empty think block
    assert figures["cut"]["conversations"] == 1
    assert "data.thinking is 'loud'" in shell.refusal(
        "dataset", "stats", "chats", "--set", "thinking=loud"
    )
    shell.run("dataset", "remove", "chats")
    assert "There is no dataset 'chats'" in shell.refusal("dataset", "stats", "chats")


def test_a_table_needs_its_columns(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("Frage,Antwort\nEbbe?,Nein.\n")
    assert "--columns user=COLUMN" in shell.refusal("dataset", "add", str(file))
    columns = ("--columns", "user=Frage,assistant=Antwort")
    assert shell.values("dataset", "add", str(file), *columns)["num_conversations"] == 1
    assert "Fragen" in shell.refusal("dataset", "add", str(file), "--columns", "user=Fragen")
    shell.run("dataset", "remove", "table")


def test_a_finished_run_is_forked_and_cloned(shell: Shell, tmp_path: Path) -> None:
    shell.values("dataset", "add", str(EXAMPLE))
    spec = tmp_path / "spec.yaml"
    spec.write_text("preset: tiny-qwen3.5\ndata: {dataset: '1'}\ntrain: {max_steps: 3}\n")
    first = shell.values("run", str(spec), "--priority", "5", "--wait")
    number = str(first["id"])
    assert (first["state"], first["priority"]) == ("FINISHED", 5)
    assert [one["step"] for one in shell.values("checkpoints", number)] == [3]
    assert "Nothing is left to train" in shell.refusal("fork", number, "--step", "3")
    longer = ("--set", "train.max_steps=5", "--set", "optim.learning_rate=1e-4")
    fork = shell.values("fork", number, "--step", "3", *longer, "--wait")
    assert (fork["state"], fork["step"], fork["parent"]) == ("FINISHED", 5, first["id"])
    kinds = [event["kind"] for event in shell.values("history", str(fork["id"]))]
    assert kinds[0] == "forked"
    assert {"began", "finished"} <= set(kinds)
    clone = shell.values("clone", number, "--set", "train.max_steps=2", "--wait")
    assert (clone["state"], clone["step"], clone["parent"]) == ("FINISHED", 2, None)
    changes = shell.values("diff", number, str(clone["id"]))
    assert [(c["field"], c["old"], c["new"]) for c in changes] == [("train.max_steps", "3", "2")]


def test_a_run_without_wait_goes_on_and_can_be_stopped(shell: Shell, tmp_path: Path) -> None:
    shell.values("dataset", "add", str(EXAMPLE))
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "preset: tiny-qwen3-next\ndata: {dataset: '1'}\ntrain: {epochs: 500, max_steps: 100000}\n"
    )
    run = shell.values("run", str(spec))
    assert run["state"] in ("QUEUED", "RUNNING")
    number = str(run["id"])
    while shell.values("show", number)["step"] < 2:
        time.sleep(LOOK_SECONDS)
    assert shell.values("stop", number)["state"] in ("STOPPING", "STOPPED")
    while (now := shell.values("show", number))["state"] == "STOPPING":
        time.sleep(LOOK_SECONDS)
    assert now["state"] == "STOPPED"
    folder = Path(now["folder"])
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert len(list((folder / "checkpoints").iterdir())) == 1


def test_bad_input_is_answered_in_words(shell: Shell, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "bot", "content": "x"}]}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    text = tmp_path / "text.jsonl"
    text.write_text('{"messages": oops}\n')
    spec = tmp_path / "spec.yaml"
    assert "line 1, messages[0].role" in shell.refusal("dataset", "add", str(bad))
    assert "holds no records" in shell.refusal("dataset", "add", str(empty))
    assert "line 1: not JSON" in shell.refusal("dataset", "check", str(text))
    assert "There is no file" in shell.refusal("dataset", "add", str(tmp_path / "none.jsonl"))
    assert shell.values("dataset", "list") == [
        row for row in shell.values("dataset", "list") if row["name"] not in ("bad", "empty")
    ]
    cases = {
        "preset: nope": "There is no preset 'nope'",
        "preset: tiny-qwen3.5\nlora: {targets: [nope]}": "lora.targets.0 is 'nope'",
        "preset: tiny-qwen3.5\nlora: {targets: [shared_expert]}\ndata: {dataset: '1'}": "shared_expert matches nothing in this model",
        "preset: tiny-qwen3.5\noptim: {learning_rate: .nan}": "optim.learning_rate is",
        "preset: tiny-qwen3.5": "No dataset is chosen",
        "preset: tiny-qwen3.5\ndata: {dataset: elsewhere}": "There is no dataset 'elsewhere'",
    }
    shell.run("dataset", "add", str(EXAMPLE))
    for content, words in cases.items():
        spec.write_text(content)
        assert words in shell.refusal("run", str(spec))
    assert f"There is no file {tmp_path}/none.yaml." in shell.refusal(
        "run", str(tmp_path / "none.yaml")
    )
    assert "There is no run 99" in shell.refusal("show", "99")
    assert "There is no run 99" in shell.refusal("merge", "99")
    assert "message is empty" in shell.refusal("chat", "1", "-m", " ")
    assert "no login yet" in shell.refusal("up", "--host", "0.0.0.0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_run_for_a_gpu_waits_for_one_and_says_so(shell: Shell, tmp_path: Path) -> None:
    shell.run("dataset", "add", str(EXAMPLE))
    spec = tmp_path / "spec.yaml"
    spec.write_text("preset: tiny-qwen3.5\ndata: {dataset: '1'}\ntrain: {num_gpus: 1}\n")
    number = shell.values("run", str(spec))["id"]
    deadline = time.monotonic() + 60
    while "no worker has" not in (told := shell.run("queue").stdout):
        assert time.monotonic() < deadline, told
        time.sleep(LOOK_SECONDS)
    assert "1 GPU" in told
    assert shell.values("show", str(number))["state"] == "QUEUED"
    assert shell.values("stop", str(number))["state"] == "STOPPED"


def test_a_port_in_use_is_said_before_anything_starts(shell: Shell) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"Port {port} on 127.0.0.1 is in use" in shell.refusal("up", "--port", port)
        assert f"Port {port} on 127.0.0.1 is in use" in shell.refusal("demo", "--port", port)


def test_a_home_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    done = Shell(file / "home").run("runs")
    assert done.returncode == WRONG_INPUT
    assert "Traceback" not in done.stderr


def test_presets_and_doctor_report_as_json(shell: Shell) -> None:
    names = [preset["name"] for preset in shell.values("presets")]
    assert names[0] == "tiny-qwen3.5"
    assert set(names) == {path.stem for path in (TEMPLATES / "presets").glob("*.yaml")}
    findings = {finding["name"]: finding for finding in shell.values("doctor")}
    assert findings["torch"]["good"]
    assert findings["disk"]["good"]
