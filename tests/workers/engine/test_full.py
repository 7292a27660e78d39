"""Full fine-tuning: everything trains, the written model is a whole one in the base's own names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from studio.domain.train_spec import TrainSpec
from studio.errors import EngineError
from tests.workers.engine.small import SIZES, write_small
from workers.engine.full import place_of, save_full, train_all
from workers.engine.full_proofs import group_of, prove_full_learned
from workers.engine.model import load_base
from workers.engine.world import World, open_world

FOREIGN = {
    "mtp.layers.0.self_attn.q_proj.weight": torch.arange(64.0).reshape(8, 8).bfloat16(),
    "model.visual.blocks.0.mlp.weight": torch.tensor([[1.0, float("nan")]]).bfloat16(),
}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def world() -> World:
    return open_world(TrainSpec(num_gpus=0))


@pytest.fixture(scope="module", params=SIZES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as the hub has it: experts one by one (Qwen3-Next) or together, foreign parts."""
    kind: str = request.param
    folder = write_small(kind, tmp_path_factory.mktemp(kind))
    tensors = load_file(folder / "model.safetensors")
    if kind != "qwen3_next":
        tensors = {
            key.replace("model.", "model.language_model.", 1): value
            for key, value in tensors.items()
        }
    if kind == "qwen3_5_moe_text":
        tensors = _together(tensors)
    _write_shards(folder, tensors | FOREIGN)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def _together(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fuse experts as the published Qwen3.5 has them."""
    fused = {key: value for key, value in tensors.items() if ".experts." not in key}
    names = {key.split(".experts.")[0] for key in tensors if ".experts." in key}
    for name in names:
        rows = [
            {
                part: tensors[f"{name}.experts.{e}.{part}_proj.weight"]
                for part in ("gate", "up", "down")
            }
            for e in range(4)
        ]
        gate_up = [torch.cat([row["gate"], row["up"]]) for row in rows]
        fused[f"{name}.experts.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{name}.experts.down_proj"] = torch.stack([row["down"] for row in rows])
    return fused


def _write_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    # Cut so that the parts of one expert lie in different files.
    files = {
        key: f"model-{1 + index % 3:05d}-of-00003.safetensors" for index, key in enumerate(keys)
    }
    for name in set(files.values()):
        save_file(
            {k: tensors[k] for k in keys if files[k] == name}, folder / name, {"format": "pt"}
        )
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index))


@torch.no_grad()
def _move(model: nn.Module, seed: int = 3) -> None:
    """Change every weight, to numbers that the base's bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_((parameter + noise).bfloat16().float())


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: value
        for path in folder.glob("*.safetensors")
        for key, value in load_file(path).items()
    }


def test_everything_of_the_text_model_trains(base: Path) -> None:
    model = load_base(base, method="full")
    count = train_all(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    foreign = sum(tensor.numel() for tensor in FOREIGN.values())
    assert count == sum(tensor.numel() for tensor in _tensors(base).values()) - foreign


def test_stock_transformers_reads_the_trained_model(
    base: Path, world: World, tmp_path: Path
) -> None:
    model = load_base(base, method="full")
    _move(model)
    save_full(model, base, tmp_path / "model", world)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    again, report = loaded
    assert not report["missing_keys"]
    tokens = torch.arange(1, 13)[None]
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    # The same arithmetic: ours routes experts through another function.
    if "num_experts" in again.config.to_dict():
        model.set_experts_implementation(again.config._experts_implementation)  # noqa: SLF001
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_the_folder_is_the_base_with_trained_tensors_replaced(
    base: Path, world: World, tmp_path: Path
) -> None:
    model = load_base(base, method="full")
    _move(model)
    save_full(model, base, tmp_path / "model", world)
    before, after = _tensors(base), _tensors(tmp_path / "model")
    assert before.keys() == after.keys()
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "model").iterdir()} == names
    for name in names:
        if name.endswith(".json"):
            assert (tmp_path / "model" / name).read_bytes() == (base / name).read_bytes()
    for key, tensor in before.items():
        is_same = torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8))
        assert tensor.dtype == after[key].dtype
        assert is_same == (key in FOREIGN), key


def test_a_base_that_lacks_a_trained_tensor_is_refused(
    base: Path, world: World, tmp_path: Path
) -> None:
    model = load_base(base, method="full")
    tensors = _tensors(base)
    kept = {key: value for key, value in tensors.items() if not key.endswith("norm.weight")}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(EngineError, match=r"trained weights have no place in .*norm"):
        save_full(model, tmp_path, tmp_path / "model", world)
    assert not (tmp_path / "model").exists()


def test_what_moved_is_measured_by_group_and_layer(
    base: Path, world: World, tmp_path: Path
) -> None:
    model = load_base(base, method="full")
    _move(model)
    save_full(model, base, tmp_path / "model", world)
    proof = prove_full_learned(tmp_path / "model", base)
    assert proof.passed, proof.summary
    found = proof.details["relative_change"]
    assert {group_of(name) for name, _ in model.named_parameters()} == found.keys()
    assert "other" not in found
    before = load_base(base, method="full")
    new, old = (one.get_parameter("lm_head.weight").detach() for one in (model, before))
    assert found["head"] == pytest.approx(float((new - old).norm() / old.norm()))
    assert list(proof.details["relative_change_by_layer"]) == ["0", "1"]


def test_a_group_that_did_not_move_is_named(base: Path, world: World, tmp_path: Path) -> None:
    model, before = load_base(base, method="full"), load_base(base, method="full")
    _move(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn.q_proj" in name or group_of(name) == "delta_net_gates":
                parameter.copy_(before.get_parameter(name))
            if name == "lm_head.weight":  # below the distance of two bfloat16 numbers
                parameter.copy_(before.get_parameter(name) * (1 + 1e-5))
    save_full(model, base, tmp_path / "model", world)
    proof = prove_full_learned(tmp_path / "model", base)
    assert proof.passed is False
    assert "delta_net_gates" in proof.summary.split("did not move")[0]
    assert "head" in proof.summary.split("did not move")[0]
    still = proof.details["tensors_that_did_not_move"]
    assert still["attention"] == 1
    assert "q_proj" in proof.details["first_that_did_not_move"]["attention"]


def test_a_foreign_tensor_that_changed_fails(base: Path, world: World, tmp_path: Path) -> None:
    model = load_base(base, method="full")
    _move(model)
    save_full(model, base, tmp_path / "model", world)
    key = "mtp.layers.0.self_attn.q_proj.weight"
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        if key in tensors:
            tensors[key][0, 0] += 1
            save_file(tensors, path)
    proof = prove_full_learned(tmp_path / "model", base)
    assert proof.passed is False
    assert key in proof.summary


def test_experts_one_by_one_lie_in_their_rows() -> None:

    whole = torch.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    gate, up, down = (
        place_of(f"model.layers.1.mlp.experts.1.{part}_proj.weight")
        for part in ("gate", "up", "down")
    )
    assert gate is not None
    assert up is not None
    assert down is not None
    assert gate.parameter == up.parameter == "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(gate.cut(whole), whole[1, :3])
    assert torch.equal(up.cut(whole), whole[1, 3:])
    assert down.parameter == "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(down.cut(whole), whole[1])
