"""A whole run on two processes of a CPU: the same losses as on one, and every proof."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from studio.disk import RunFolder
from tests.workers.engine.conftest import MakeRun
from tests.workers.engine.test_main import ROOT
from tests.workers.engine.test_train import proofs, records
from workers.engine.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Experts in 4 bits, packed rows, evaluation and samples: all that exchanges something.
EVERYTHING: dict[str, Any] = {
    "model": {"id": "tiny/qwen3.5-moe"},
    "lora": {"targets": ["attention", "routed_experts"], "dropout": 0.0},
    "batch": {"packing": True, "micro_batch_size": 1, "gradient_accumulation_steps": 3},
    "data": {"max_length_tokens": 512, "eval_share": 0.25},
    "eval": {"prompts": ["Who are you?"], "prompt_tokens": 3},
    "train": {"max_steps": 3, "epochs": 20},
}


def train_on_two(run: RunFolder) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "workers.engine", str(run.path)]
    with run.log.open("wb") as log:
        ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)
    assert ended.returncode == 0, run.log.read_text()[-3000:]


def values(run: RunFolder, name: str) -> list[float]:
    return [record.values[name] for record in records(run) if name in record.values]


def test_two_processes_train_as_one_does(make_run: MakeRun, dataset: Path) -> None:
    changes = EVERYTHING | {"data": EVERYTHING["data"] | {"dataset": dataset.stem}}
    one, two = make_run(**changes), make_run(**changes)
    train(one)
    train_on_two(two)

    for name in ("loss", "eval_loss"):
        assert values(two, name) == pytest.approx(values(one, name), abs=1e-5)
    assert len(values(two, "loss")) == 3
    assert two.samples.read_text() == one.samples.read_text()
    passed = {name: proof.passed for name, proof in proofs(two).items()}
    assert passed == {name: proof.passed for name, proof in proofs(one).items()}
    assert passed["leak"]
    assert passed["coverage"]
    assert passed["learned"]
