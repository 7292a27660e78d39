"""Checkpoints: exact to the bit, believed only when whole, no pickle."""

import json
import logging
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.disk import RunFolder
from studio.domain.lora_spec import LoraSpec
from studio.domain.spec import OptimSpec
from studio.domain.train_spec import TrainSpec
from studio.errors import EngineError, MachineError
from tests.workers.engine.small import write_small
from workers.engine.checkpoint import (
    Progress,
    load_checkpoint,
    load_weights,
    save_adapter,
    save_checkpoint,
)
from workers.engine.checkpoint_files import damage_of, latest_good, prune
from workers.engine.lora import add_adapter
from workers.engine.model import load_base
from workers.engine.optim import build_optimizer, learning_rate_at, set_learning_rate
from workers.engine.parallel import clip_gradients, wrap
from workers.engine.world import World, open_world

OPTIMIZERS = ("adamw", "adamw_8bit", "ademamix_8bit")


class Run:
    """A run by hand: dropout, noise on the embeddings, a schedule, and what the steps measured."""

    def __init__(self, base: Path, world: World, optimizer: str = "adamw", rank: int = 64) -> None:
        self.world = world
        self.optim = OptimSpec(optimizer=optimizer, learning_rate=3e-3, schedule="cosine")
        world.seed_adapter(11)
        # Rank 64: A and B have 4,096 numbers, from which on bitsandbytes keeps 8 bits.
        lora = LoraSpec(rank=rank, dropout=0.2, targets=("attention", "delta_net"))
        self.model = add_adapter(load_base(base, method="lora"), lora)
        world.seed_training(11)
        self.root = wrap(self.model.train(), world)
        self.optimizer = build_optimizer(self.model.named_parameters(), self.optim)
        self.progress = Progress(step=0, base_id="tiny/small")

    def train(self, steps: int) -> "Run":
        """Take some steps."""
        for _ in range(steps):
            number = self.progress.step + 1
            tokens = torch.randint(1, 128, (2, 10), generator=torch.Generator().manual_seed(number))
            loss = self.root(_noisy_loss, tokens)
            loss.backward()
            clip_gradients(self.model.parameters(), 1.0)
            set_learning_rate(self.optimizer, learning_rate_at(self.optim, number, 6))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.progress.losses.append(float(loss.detach()))
            self.progress.step = number
        return self

    def save(self, folder: Path) -> Path:
        """Save a Checkpoint in a run folder."""
        run = RunFolder(path=folder)
        return save_checkpoint(run, self.model, self.optimizer, self.world, self.progress)

    def load(self, folder: Path) -> "Run":
        """Go on from a Checkpoint."""
        self.progress = load_checkpoint(folder, self.model, self.optimizer, self.world)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        """Copy what trains."""
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}


def _noisy_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    embedded = model.get_input_embeddings()(tokens)
    embedded = embedded + torch.empty_like(embedded).uniform_(-0.01, 0.01)
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.fixture(scope="module")
def world() -> World:
    return open_world(TrainSpec(num_gpus=0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small("qwen3_5_text", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base: Path, world: World) -> dict[str, Run]:
    """Runs of six steps without a stop."""
    return {name: Run(base, world, name).train(6) for name in OPTIMIZERS}


@pytest.fixture(scope="module")
def stopped(base: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with Checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("stopped")
    run = Run(base, world)
    for _ in range(3):
        run.train(1).save(folder)
    return folder


@pytest.fixture
def checkpoints(stopped: Path, tmp_path: Path) -> Path:
    """A copy of those Checkpoints, to be spoilt."""
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


# ---- exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    base: Path, world: World, whole: dict[str, Run], optimizer: str, stop: int, tmp_path: Path
) -> None:
    saved = Run(base, world, optimizer).train(stop).save(tmp_path)
    resumed = Run(base, world, optimizer).load(saved).train(6 - stop)
    assert resumed.progress.losses == whole[optimizer].progress.losses
    expected, found = whole[optimizer].weights(), resumed.weights()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert len(set(resumed.progress.losses)) == 6


def test_eight_bit_states_were_really_in_eight_bits(whole: dict[str, Run]) -> None:
    for name in ("adamw_8bit", "ademamix_8bit"):
        states = whole[name].optimizer.state.values()
        assert any(state["state1"].dtype == torch.uint8 for state in states)


def test_what_a_save_does_leaves_the_run_as_it_is(
    base: Path, world: World, whole: dict[str, Run], tmp_path: Path
) -> None:
    run = Run(base, world)
    for _ in range(6):
        run.train(1).save(tmp_path)
    assert run.progress.losses == whole["adamw"].progress.losses


def test_weights_alone_come_back_for_the_best_evaluation(
    base: Path, world: World, tmp_path: Path
) -> None:
    run = Run(base, world).train(1)
    best, saved = run.weights(), run.save(tmp_path)
    run.train(1)
    assert not all(torch.equal(best[name], now) for name, now in run.weights().items())
    load_weights(saved, run.model, world)
    assert all(torch.equal(best[name], now) for name, now in run.weights().items())


def test_progress_comes_back_as_it_was(base: Path, world: World, tmp_path: Path) -> None:
    run = Run(base, world).train(1)
    run.progress.evaluations = [(0, 5.25), (1, 0.1 + 0.2)]
    run.progress.notes = {"best": 1}
    assert Run(base, world).load(run.save(tmp_path)).progress == run.progress


def test_the_adapter_is_saved_as_peft_saves_it(base: Path, world: World, tmp_path: Path) -> None:
    run = Run(base, world).train(1)
    save_adapter(run.model, "org/base", tmp_path / "ours")
    run.model.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["inference_mode"] is True


# ---- believed only when whole -----------------------------------------------------------------


def test_nothing_in_a_checkpoint_is_a_pickle(stopped: Path) -> None:
    files = [path for path in stopped.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert not any(path.read_bytes()[:2] in (b"\x80\x02", b"PK") for path in files)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name", ["state.json", "rng-00000.safetensors", "manifest.json", "tensors"]
)
@pytest.mark.parametrize("spoil", [Path.unlink, _cut, _flip])
def test_a_damaged_checkpoint_is_named_and_left_out(
    checkpoints: Path, caplog: pytest.LogCaptureFixture, name: str, spoil: Any
) -> None:
    newest = checkpoints / "step-000003"
    path = newest / name
    spoil(next(path.iterdir()) if path.is_dir() else path)
    with caplog.at_level(logging.WARNING):
        assert latest_good(checkpoints) == checkpoints / "step-000002"
    assert "step-000003" in caplog.text
    assert path.name in caplog.text


def test_a_file_that_nobody_wrote_is_found(checkpoints: Path) -> None:
    folder = checkpoints / "step-000003"
    assert damage_of(folder) == ""
    save_file({"model|x": torch.zeros(1)}, folder / "tensors" / "more.safetensors")
    assert damage_of(folder) == "tensors/more.safetensors is not in its manifest"


def test_a_damaged_checkpoint_is_refused(checkpoints: Path, base: Path, world: World) -> None:
    folder = checkpoints / "step-000003"
    (folder / "rng-00000.safetensors").unlink()
    with pytest.raises(EngineError, match=r"is damaged: rng-00000.safetensors is missing\."):
        Run(base, world).load(folder)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_good(tmp_path / "checkpoints") is None
    assert prune(tmp_path / "checkpoints", 1) == []


def test_a_checkpoint_of_another_adapter_is_refused(
    checkpoints: Path, base: Path, world: World
) -> None:
    with pytest.raises(EngineError, match=r"is of another model: .*lora_A"):
        Run(base, world, rank=8).load(checkpoints / "step-000003")


def test_a_checkpoint_of_another_optimizer_is_refused(
    checkpoints: Path, base: Path, world: World
) -> None:
    with pytest.raises(EngineError, match="as another optimizer keeps it") as caught:
        Run(base, world, "adamw_8bit").load(checkpoints / "step-000003")
    assert caught.value.field == "optim.optimizer"
    eight = Run(base, world, "adamw_8bit").train(1).save(checkpoints.parent)
    with pytest.raises(EngineError, match="as another optimizer keeps it"):
        Run(base, world).load(eight)


def test_an_older_format_is_refused_in_a_sentence(
    checkpoints: Path, base: Path, world: World
) -> None:
    folder = checkpoints / "step-000003"
    (folder / "manifest.json").unlink()
    (folder / "state.json").write_text('{"version": 1, "step": 3}')
    with pytest.raises(EngineError, match=r"manifest\.json is missing"):
        Run(base, world).load(folder)


def test_a_save_that_fails_leaves_the_older_one(
    checkpoints: Path, base: Path, world: World
) -> None:
    run = Run(base, world).load(checkpoints / "step-000003")
    # What a save is written into first stands in the way as a file in its place.
    (checkpoints / ".step-000003.0.part").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        run.save(checkpoints.parent)
    assert damage_of(checkpoints / "step-000003") == ""


def test_a_disk_that_takes_no_more_is_the_error_and_not_what_torch_makes_of_it(
    checkpoints: Path, base: Path, world: World
) -> None:
    run = Run(base, world).load(checkpoints / "step-000003").train(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            run.save(checkpoints.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert latest_good(checkpoints) == checkpoints / "step-000003"
    assert run.save(checkpoints.parent).name == "step-000004"


def test_pruning_keeps_the_newest_and_the_best(checkpoints: Path) -> None:
    (checkpoints / ".step-000004.part").mkdir()
    gone = prune(checkpoints, keep=1, best=1)
    assert {path.name for path in gone} == {"step-000002", ".step-000004.part"}
    assert {path.name for path in checkpoints.iterdir()} == {"step-000001", "step-000003"}


def test_pruning_never_trusts_a_cut_off_one(checkpoints: Path) -> None:
    _cut(next((checkpoints / "step-000003" / "tensors").iterdir()))
    prune(checkpoints, keep=1)
    assert {path.name for path in checkpoints.iterdir()} == {"step-000002"}
