"""What an Adapter holds is placed in the base or refused by name, never dropped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file

from studio.disk import Home
from studio.domain.spec import ModelRef
from studio.errors import EngineError
from workers.adapter import read_adapter
from workers.engine.lora import load_adapter
from workers.engine.model import find_base, load_base
from workers.placing import place
from workers.shards import find_shards

MODEL = "tiny/qwen3.5"


def test_rslora_and_patterns_scale_as_in_peft(
    models_home: Home, tmp_path: Path, adapter_of: Callable[[str], Path]
) -> None:
    adapter = shutil.copytree(adapter_of(MODEL), tmp_path / "adapter")
    _edit(adapter / "adapter_config.json", use_rslora=True, alpha_pattern={"o_proj": 7})
    base = find_base(ModelRef(id=MODEL), models_home)
    ours = read_adapter(adapter).changes
    theirs = load_adapter(load_base(base, method="lora"), adapter)

    for name, low_rank in ours.items():
        layer = theirs.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        assert isinstance(layer, Linear)
        assert low_rank.scale == pytest.approx(layer.scaling["default"])
    assert ours["model.layers.3.self_attn.o_proj.weight"].scale == pytest.approx(7 / 32**0.5)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", "layers.0.mlp.experts"),
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_magnitude_vector", "magnitude"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "layers.9"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embed_tokens"),
    ],
)
def test_a_tensor_without_a_place_is_named_not_dropped(
    key: str, named: str, models_home: Home, tmp_path: Path, adapter_of: Callable[[str], Path]
) -> None:
    adapter = shutil.copytree(adapter_of(MODEL), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[key] = torch.zeros(32, 256)
    if key.endswith("lora_A.weight"):
        tensors[key.replace("lora_A", "lora_B")] = torch.zeros(8, 32)
    save_file(tensors, adapter / "adapter_model.safetensors")

    with pytest.raises(EngineError, match=named):
        place(read_adapter(adapter), find_shards(find_base(ModelRef(id=MODEL), models_home)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("some_future_variant", {"strength": 2}),
    ],
)
def test_a_setting_that_means_another_sum_is_refused(
    field: str, value: object, tmp_path: Path, adapter_of: Callable[[str], Path]
) -> None:
    adapter = shutil.copytree(adapter_of(MODEL), tmp_path / "adapter")
    _edit(adapter / "adapter_config.json", **{field: value})
    with pytest.raises(EngineError, match=field):
        read_adapter(adapter)


def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, adapter_of: Callable[[str], Path]
) -> None:
    adapter = shutil.copytree(adapter_of(MODEL), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    broken = sorted(tensors)[0]
    tensors[broken][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(EngineError, match=broken):
        read_adapter(adapter)


def test_an_adapter_for_another_width_is_refused(
    models_home: Home, adapter_of: Callable[[str], Path]
) -> None:
    other = find_shards(find_base(ModelRef(id="tiny/qwen3-next"), models_home))
    with pytest.raises(EngineError, match=r"mlp\.down_proj"):
        place(read_adapter(adapter_of(MODEL)), other)


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
