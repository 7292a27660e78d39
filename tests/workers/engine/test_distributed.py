"""Two processes train what one trains: the real torchrun, gloo, FSDP2 and Checkpoints."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from studio.disk import RunFolder
from studio.domain.train_spec import TrainSpec
from tests.workers.engine.ranks import Case, agree, train
from tests.workers.engine.small import SIZES, write_small
from workers.engine.world import World, open_world

ROOT = Path(__file__).resolve().parents[3]
# Starting takes longer than training: two processes import everything once more.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SECONDS = 400
SAME = 1e-5
CASES: dict[str, dict[str, Any]] = {
    "next-lora": {"kind": "qwen3_next", "method": "lora"},
    "next-qlora": {
        "kind": "qwen3_next",
        "method": "qlora-floats",
        "targets": ("routed_experts", "router", "shared_expert", "attention"),
    },
    "next-full": {"kind": "qwen3_next", "method": "full", "save_at": 2},
    "dense-lora": {"kind": "qwen3_5_text", "method": "lora", "save_at": 2},
    "dense-qlora": {"kind": "qwen3_5_text", "method": "qlora-floats"},
    "dense-full": {"kind": "qwen3_5_text", "method": "full"},
    "dense-full-on-two-machines": {"kind": "qwen3_5_text", "method": "full", "num_nodes": 2},
    "moe-lora-recomputed": {"kind": "qwen3_5_moe_text", "method": "lora", "recompute": True},
    "moe-qlora": {"kind": "qwen3_5_moe_text", "method": "qlora-floats"},
    "moe-qlora-in-bytes": {"kind": "qwen3_5_moe_text", "method": "qlora"},
    "moe-full": {"kind": "qwen3_5_moe_text", "method": "full"},
}
WITH_ADAPTER = tuple(name for name, case in CASES.items() if case["method"] != "full")
SAVED = tuple(name for name, case in CASES.items() if "save_at" in case)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What one process and what two made of the same cases."""

    one: Path
    two: Path


@pytest.fixture(scope="module")
def world() -> World:
    return open_world(TrainSpec(num_gpus=0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, world: World) -> Trained:
    """Train all cases alone, then with two processes: one start of torchrun, as it takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    bases = {kind: write_small(kind, folder / kind) for kind in SIZES}
    cases = {name: _case(name, bases, **values) for name, values in CASES.items()}
    done = Trained(one=folder / "one", two=folder / "two")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: another number adds up in another order
    for name, case in cases.items():
        train(case.model_copy(update={"out": done.one / name, "num_nodes": 1}), world)
    torch.set_num_threads(threads)
    order = [case.model_copy(update={"out": done.two / name}) for name, case in cases.items()]
    for name in SAVED:
        resume = RunFolder(path=done.one / name).checkpoint(2)
        changes = {"out": done.two / f"{name} resumed", "resume": resume, "save_at": None}
        order.append(cases[name].model_copy(update=changes))
    try:
        _torchrun(order, folder / "order.json")
    except AssertionError as error:
        # Seen once in hundreds: a rank dies inside gloo's own code (torch 2.13, two processes on a
        # loaded machine). What a rank computes wrong is no signal, and is not tried again.
        if "(SIGSEGV)" not in str(error):
            raise
        _torchrun(order, folder / "again.json")
    return done


def _case(name: str, bases: Mapping[str, Path], **values: Any) -> Case:
    base = bases[values.pop("kind")]
    return Case(name=name, base=base, out=base, **values)


def _torchrun(cases: list[Case], order: Path) -> None:
    order.write_text(json.dumps([case.model_dump(mode="json") for case in cases]))
    script = Path(__file__).with_name("ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=0", str(script), str(order)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": os.defpath}
    log = order.with_name("log.txt")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert process.wait(SECONDS) == 0, log.read_text()[-5000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _told(folder: Path, what: str) -> list[float]:
    told: list[float] = json.loads((folder / "told.json").read_text())[what]
    return told


def _agreed(folder: Path, ranks: int) -> list[dict[str, Any]]:
    paths = [folder / "next-lora" / f"agreed-{rank}.json" for rank in range(ranks)]
    return [json.loads(path.read_text()) for path in paths]


def _losses(folder: Path) -> list[float]:
    return _told(folder, "losses")


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].sort()  # PEFT keeps a set
    return config


def _difference(one: Path, two: Path) -> float:
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys()
    return max(float((a[key].float() - b[key].float()).abs().max()) for key in a)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_losses_and_the_weights_of_one(trained: Trained, name: str) -> None:
    one, two = _losses(trained.one / name), _losses(trained.two / name)
    assert len(one) == len(two) == 4
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < SAME
    # Adam and clipping hide a gradient that is a mean over ranks and not their sum.
    norms = (_told(folder / name, "norms") for folder in (trained.one, trained.two))
    assert all(b == pytest.approx(a, rel=1e-4) for a, b in zip(*norms, strict=True))
    file = "trained.safetensors"
    assert _difference(trained.one / name / file, trained.two / name / file) < SAME


@pytest.mark.parametrize("name", WITH_ADAPTER)
def test_the_adapter_of_two_ranks_is_gathered_whole(trained: Trained, name: str) -> None:
    one, two = trained.one / name / "adapter", trained.two / name / "adapter"
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert _config(one) == _config(two)
    file = "adapter_model.safetensors"
    assert _difference(one / file, two / file) < SAME


def test_weights_moved_so_that_equality_says_something(trained: Trained) -> None:
    for name in CASES:
        losses = _losses(trained.one / name)
        assert max(losses) - min(losses) > 1e-2, name


def test_each_of_two_ranks_holds_half(trained: Trained) -> None:
    for name in ("next-lora", "next-qlora", "next-full"):
        (alone,) = _told(trained.one / name, "bytes")
        shares = _told(trained.two / name, "bytes")
        assert sum(shares) < alone * 1.02, name
        assert max(shares) < alone * 0.55, name
    # Packed as bytes, what is in 4 bits stays whole on both.
    (alone,) = _told(trained.one / "moe-qlora-in-bytes", "bytes")
    assert sum(_told(trained.two / "moe-qlora-in-bytes", "bytes")) > alone * 1.1


def test_ranks_hear_of_each_other(trained: Trained) -> None:
    first, second = _agreed(trained.two, 2)
    for told in (first, second):
        assert told["refusal"] == "Rank 0 said no."
        assert told["met"] == ["The last one met it.", 65]
        assert told["vote"] == [True, False, True]
        assert told["main"] == 0
    assert [told["is_filled"] for told in (first, second)] == [False, True]
    assert first["dropout"] != second["dropout"]


def test_a_reply_and_a_loss_before_the_first_step_are_those_of_one_process(
    trained: Trained, world: World
) -> None:
    case = _case("x", {"qwen3_next": trained.one.parent / "qwen3_next"}, **CASES["next-lora"])
    agree(case.model_copy(update={"out": trained.one / "next-lora"}), world)
    (alone,) = _agreed(trained.one, 1)
    for told in _agreed(trained.two, 2):
        assert told["reply"] == alone["reply"]
        assert told["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.parametrize("name", SAVED)
def test_one_checkpoint_is_written_by_both_ranks(trained: Trained, name: str) -> None:
    saved = RunFolder(path=trained.two / name).checkpoint(2)
    files = sorted(path.name for path in (saved / "tensors").iterdir())
    assert len(files) == 2
    bytes_of = [(saved / "tensors" / file).stat().st_size for file in files]
    assert min(bytes_of) > 0.3 * max(bytes_of)
    with safe_open(saved / "tensors" / files[0], framework="pt") as file:
        assert any(key.startswith("optimizer|") for key in file.keys())


@pytest.mark.parametrize("name", SAVED)
def test_saved_by_two_ranks_resumed_by_one(
    trained: Trained, world: World, name: str, tmp_path: Path
) -> None:
    values = {**CASES[name], "save_at": None}
    base = trained.one.parent / values.pop("kind")
    resume = RunFolder(path=trained.two / name).checkpoint(2)
    case = Case(name=name, base=base, out=tmp_path, resume=resume, **values)
    losses = train(case, world)
    assert max(abs(a - b) for a, b in zip(losses, _losses(trained.one / name), strict=True)) < SAME
    file = "trained.safetensors"
    assert _difference(trained.one / name / file, tmp_path / file) < SAME


@pytest.mark.parametrize("name", SAVED)
def test_saved_by_one_rank_resumed_by_two(trained: Trained, name: str) -> None:
    resumed = trained.two / f"{name} resumed"
    losses = _losses(resumed)
    assert max(abs(a - b) for a, b in zip(losses, _losses(trained.one / name), strict=True)) < SAME
    file = "trained.safetensors"
    assert _difference(trained.one / name / file, resumed / file) < SAME


def test_bfloat16_copies_are_computed_with_and_float32_weights_train(
    trained: Trained, world: World, tmp_path: Path
) -> None:
    base = trained.one.parent / "qwen3_5_text"
    case = Case(name="x", base=base, method="full", out=tmp_path, compute_dtype="bfloat16")
    try:
        losses = train(case, world)
    finally:
        torch.distributed.destroy_process_group()  # of itself, for the cast
    exact = _losses(trained.one / "dense-full")
    distance = max(abs(a - b) for a, b in zip(losses, exact, strict=True))
    assert 1e-5 < distance < 0.1
    assert {t.dtype for t in load_file(tmp_path / "trained.safetensors").values()} == {
        torch.float32
    }
