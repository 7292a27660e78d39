"""A model that a run trained as a whole becomes a Merge that says what changed, and how much."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.disk import Home
from studio.domain.certificate import Certificate
from studio.domain.orders import MergeOrder
from studio.domain.spec import ModelRef
from tests.workers.small_models import publish
from workers.merge import merge
from workers.shards import find_shards
from workers.trained import what_changed

pytestmark = pytest.mark.usefixtures("one_thread")
MOVED = "model.layers.0.mlp.down_proj.weight"
TOWER, NEXT = "model.visual.pos_embed.weight", "mtp.layers.0.mlp.experts.0.down_proj.weight"

Tensors = dict[str, torch.Tensor]


def _trained(base: Path, target: Path, train: Callable[[Tensors], None]) -> Path:
    """Do what the engine does: the base's files, with other values in the text model's tensors."""
    shutil.copytree(base, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        train(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return target


def _one_step(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if name.startswith(("model.language_model.", "model.layers", "lm_head")):
            if tensor.dim() > 1:
                tensor += 0.01 * tensor.abs().mean() * torch.randn(tensor.shape)


@pytest.fixture
def base(speaking: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a base as the hub publishes it, with vision tower and multi-token prediction."""
    return publish(speaking("qwen3_5_text"), tmp_path / "base")


def test_a_whole_model_becomes_a_merge_and_says_what_changed(
    base: Path, models_home: Home, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    trained = _trained(base, tmp_path / "model", _one_step)
    (trained / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    folder = models_home.merge(8001)
    folder.path.mkdir()
    order = MergeOrder(model=ModelRef(id=str(base)), trained=str(trained), run_id=1)
    folder.order.write_text(order.model_dump_json(), encoding="utf-8")
    merge(folder)
    found = Certificate.model_validate_json(folder.certificate.read_text(encoding="utf-8"))
    before, after = find_shards(base), find_shards(trained)

    assert found.failures == ()
    assert found.kind == "full"
    assert found.adapter_sha256 is None
    # Norms did not move, and none of the other groups is said to have been trained.
    assert "model.language_model.norm.weight" in found.missing_tensors
    assert not {TOWER, NEXT} & {*found.targeted_tensors, *found.changed_tensors}
    assert found.relative_change.keys() == set(found.changed_tensors)
    for name, share in found.relative_change.items():
        old, new = before.read(name).double(), after.read(name).double()
        assert share == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-9)
    assert found.mean_kl == 0
    assert found.effect_kl > 0
    assert (folder.weights / "preprocessor_config.json").exists()
    for path in trained.iterdir():
        assert (folder.weights / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(folder.path)


def _nothing(_tensors: Tensors) -> None:
    return


def _of_the_tower(tensors: Tensors) -> None:
    _one_step(tensors)
    if TOWER in tensors:
        tensors[TOWER][0, 0] = 1.0


def _of_the_next_token(tensors: Tensors) -> None:
    _one_step(tensors)
    if NEXT in tensors:
        tensors[NEXT] += 1


def _to_infinity(tensors: Tensors) -> None:
    _one_step(tensors)
    if _in_tower(MOVED) in tensors:
        tensors[_in_tower(MOVED)][3, 3] = math.inf


def _to_another_precision(tensors: Tensors) -> None:
    _one_step(tensors)
    if _in_tower(MOVED) in tensors:
        tensors[_in_tower(MOVED)] = tensors[_in_tower(MOVED)].float()


def _in_tower(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (_nothing, "No tensor changed: this is the base."),
        (_of_the_tower, f"Changed, though not targeted: {TOWER}."),
        (_of_the_next_token, f"Changed, though not targeted: {NEXT}."),
        (_to_infinity, f"Not finite: {_in_tower(MOVED)}."),
        (_to_another_precision, f"Changed, though not targeted: {_in_tower(MOVED)}."),
    ],
)
def test_a_training_that_went_wrong_is_named(
    train: Callable[[Tensors], None], said: str, base: Path, tmp_path: Path
) -> None:
    trained = find_shards(_trained(base, tmp_path / "model", train))
    assert said in _failures(what_changed(find_shards(base), trained, trained))


def test_a_merge_that_is_not_what_the_run_wrote_is_named(base: Path, tmp_path: Path) -> None:
    trained = _trained(base, tmp_path / "model", _one_step)
    written = shutil.copytree(trained, tmp_path / "written")
    shards = find_shards(written)
    name = shards.file_of[_in_tower(MOVED)]
    tensors = load_file(written / name)
    tensors[_in_tower(MOVED)][0, 0] += 1
    save_file(tensors, written / name, metadata={"format": "pt"})
    found = what_changed(find_shards(base), find_shards(trained), find_shards(written))

    assert found.miswritten_tensors == (_in_tower(MOVED),)
    assert f"Not what the run wrote: {_in_tower(MOVED)}." in _failures(found)


def _failures(found: Any) -> str:
    """Return what a Certificate with such tensors says, its prompts being in order."""
    prompt = {
        "prompt": "p",
        "num_tokens": 1,
        "mean_kl": 0.0,
        "effect_kl": 0.0,
        "max_logit_difference": 0.0,
        "logit_spread": 1.0,
        "top1_agreement": 1.0,
    }
    fields = {name: getattr(found, name) for name in found.__slots__}
    values = {"kind": "full", "base_model": "b", "dtype": "bfloat16", "num_tensors": 1}
    certificate = Certificate(**values, **fields, files={}, prompts=[prompt])
    return " ".join(certificate.failures)
