"""Each tiny member of the family, from the command line: it packs, stops, goes on, and merges."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from studio.disk import TEMPLATES
from tests.e2e.conftest import end_worker
from tests.e2e.forks import Forks
from tests.e2e.shell import Shell
from tests.fakes import make_home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLE = TEMPLATES / "data" / "tidemark-support.jsonl"
LOOK_SECONDS = 0.3
STEPS = 8
TARGETS = {
    "tiny/qwen3.5": ["attention", "delta_net", "dense_mlp"],
    "tiny/qwen3.5-moe": ["attention", "routed_experts", "router"],
    "tiny/qwen3-next": ["delta_net", "delta_net_gates", "shared_expert", "routed_experts"],
}


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, verdicts: Path) -> Iterator[Shell]:
    home = make_home(tmp_path_factory.mktemp("families-home"), verdicts)
    with Forks(tmp_path_factory.mktemp("families-output")) as forks:
        shell = Shell(home.path, forks)
        shell.values("dataset", "add", str(EXAMPLE), "--name", "desk")
        yield shell
    end_worker(home)


def order(tmp_path: Path, **changes: Any) -> str:
    values = {
        "data": {"dataset": "desk", "max_length_tokens": 512},
        "batch": {"micro_batch_size": 1, "gradient_accumulation_steps": 1},
        "optim": {"learning_rate": 5e-3, "warmup_ratio": 0.0},
        "train": {"max_steps": STEPS, "epochs": 50},
    } | changes
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def wait(shell: Shell, run: str, state: str, step: int = 0) -> dict[str, Any]:
    while True:
        now: dict[str, Any] = shell.values("show", run)
        if now["state"] == state and now["step"] >= step:
            return now
        assert now["state"] not in ("FAILED", "FINISHED"), now
        time.sleep(LOOK_SECONDS)


def proofs(shown: dict[str, Any]) -> dict[str, bool | None]:
    return {proof["name"]: proof["passed"] for proof in shown["proofs"]}


@pytest.mark.parametrize("model", TARGETS)
def test_a_run_packs_stops_goes_on_and_is_merged(shell: Shell, tmp_path: Path, model: str) -> None:
    spec = order(
        tmp_path,
        model={"id": model},
        method="qlora",
        lora={"rank": 8, "targets": TARGETS[model], "expert_rank": "divided"},
        batch={"packing": True, "micro_batch_size": 1, "gradient_accumulation_steps": 2},
        train={"max_steps": 100_000, "epochs": 500, "save_steps": 1},
    )
    endless = str(shell.values("run", spec)["id"])
    wait(shell, endless, "RUNNING", step=2)
    shell.values("stop", endless)
    stopped = wait(shell, endless, "STOPPED")
    assert proofs(stopped) | {"loss": None, "throughput": None} == {
        "mask": True,
        "kernels": True,
        "coverage": True,
        "targets": True,
        "leak": True,
        "learned": True,
        "loss": None,
        "throughput": None,
    }

    shell.values("resume", endless)
    wait(shell, endless, "RUNNING", step=stopped["step"] + 2)
    shell.values("stop", endless)
    again = wait(shell, endless, "STOPPED")
    lines = (Path(again["folder"]) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == again["step"] > stopped["step"]  # each step once

    merge = shell.values("merge", endless, "--wait")
    assert (merge["state"], merge["certificate_passed"]) == ("FINISHED", True)


def test_all_weights_of_a_model_train_and_the_result_is_certified(
    shell: Shell, tmp_path: Path
) -> None:
    spec = order(
        tmp_path,
        model={"id": "tiny/qwen3.5"},
        method="full",
        optim={"learning_rate": 1e-3, "warmup_ratio": 0.0},
    )
    run = shell.values("run", spec, "--wait")
    assert (run["state"], run["step"]) == ("FINISHED", STEPS)
    shown = shell.values("show", str(run["id"]))
    assert proofs(shown)["targets"]
    assert proofs(shown)["learned"]

    merge = shell.values("merge", str(run["id"]), "--wait")
    assert (merge["state"], merge["certificate_passed"]) == ("FINISHED", True)
    said = shell.values("chat", str(run["id"]), "-m", "Hello", "--max-tokens", "4")
    assert said["model"] == "tuned"
