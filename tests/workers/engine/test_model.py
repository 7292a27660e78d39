"""Quantisation, LoRA targets, adapters on disk, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file, save_file
from torch import nn

from studio.disk import Home
from studio.domain.lora_spec import LoraSpec
from studio.domain.spec import ModelRef
from studio.domain.targets import TargetGroup, count_by_group, select, target_modules
from studio.errors import EngineError, InputError, NotFoundError
from tests.workers.engine.conftest import FAMILIES, all_groups
from workers.engine.checkpoint import save_adapter
from workers.engine.lora import (
    add_adapter,
    check_adapted,
    load_adapter,
    lora_layers,
    selected_modules,
)
from workers.engine.model import SIXTEEN_BIT, find_base, load_base, load_tokenizer

TOKENS = torch.arange(5, 45)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_are_nf4_except_those_that_stay_sixteen_bit(
    family: str, bases: dict[str, Path]
) -> None:
    model = load_base(bases[family], method="qlora")
    four_bit = {name for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    others = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    gates = {TargetGroup.DELTA_NET_GATES}
    expected = {
        f"model.{m.name}" for m in target_modules(model.config.to_dict()) if m.group not in gates
    }
    assert four_bit == expected
    assert "lm_head" in others
    assert all(name.endswith(SIXTEEN_BIT) for name in others)
    for name in four_bit:
        layer: Any = model.get_submodule(name)
        assert isinstance(layer, Linear4bit)
        assert layer.weight.dtype == torch.uint8
        state: Any = vars(layer.weight)["quant_state"]
        assert state.quant_type == "nf4"
        assert state.nested
        assert not layer.support_avx512bf16_for_cpu
    assert not any(p.requires_grad for p in model.parameters())


def test_nf4_weights_are_near_the_sixteen_bit_ones_but_not_equal(bases: dict[str, Path]) -> None:
    fine = load_base(bases["qwen3.5"], method="lora")
    coarse = load_base(bases["qwen3.5"], method="qlora")
    name = "model.layers.0.mlp.up_proj"
    identity = torch.eye(fine.config.hidden_size)
    exact, rounded = fine.get_submodule(name)(identity), coarse.get_submodule(name)(identity)
    error = float((exact - rounded).norm() / exact.norm())
    # NF4 of a normal distribution, blocks of 64: about 0.09 (engine research, section 4.2).
    assert 0.05 < error < 0.13


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_adapted_layers_are_the_selected_ones_and_train_what_was_counted(
    family: str, method: Literal["qlora", "lora"], bases: dict[str, Path]
) -> None:
    # The last group alone too: dense MLP or shared expert, which PEFT moves on Qwen3-Next.
    for groups in (all_groups(family), all_groups(family)[-1:]):
        lora = LoraSpec(rank=8, targets=groups)
        base = load_base(bases[family], method=method)
        chosen = select(target_modules(base.config.to_dict()), groups)
        model = add_adapter(base, lora)
        assert set(lora_layers(model)) == {f"model.{module.name}" for module in chosen}
        trainable, _ = model.get_nb_trainable_parameters()
        assert trainable == sum(count_by_group(chosen, 8).values())


def test_peft_gets_its_table_back(bases: dict[str, Path]) -> None:
    table = vars(transformers_weight_conversion)["_MODEL_TO_CONVERSION_PATTERN"]
    before = dict(table)
    lora = LoraSpec(targets=(TargetGroup.SHARED_EXPERT,))
    add_adapter(load_base(bases["qwen3-next"], method="lora"), lora)
    assert table == before
    assert before["qwen3_next"] == "qwen2_moe"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_saved_adapter_gives_the_same_logits(
    family: str, method: Literal["qlora", "lora"], bases: dict[str, Path], tmp_path: Path
) -> None:
    lora = LoraSpec(rank=4, targets=all_groups(family))
    model = add_adapter(load_base(bases[family], method=method), lora)
    layer: Any
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    model.train(False)
    expected = model(TOKENS, use_cache=False).logits
    save_adapter(model, f"tiny/{family}", tmp_path / "adapter")
    again = load_adapter(load_base(bases[family], method=method), tmp_path / "adapter")
    plain = load_base(bases[family], method=method)(TOKENS, use_cache=False).logits
    assert torch.equal(again(TOKENS, use_cache=False).logits, expected)
    assert not torch.allclose(plain, expected)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"tiny/{family}"
    assert config["target_parameters"] is None


def test_other_layers_than_selected_are_told(bases: dict[str, Path]) -> None:
    base = load_base(bases["qwen3.5"], method="lora")
    lora = LoraSpec(targets=(TargetGroup.ATTENTION,))
    names = selected_modules(base, lora)
    model = add_adapter(base, lora)
    with pytest.raises(EngineError, match=r"1 selected layers carry no LoRA, as model\.ghost"):
        check_adapted(model, [*names, "model.ghost"])
    with pytest.raises(EngineError, match="1 layers carry one that were not selected"):
        check_adapted(model, names[1:])


def test_an_adapter_of_another_family_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = LoraSpec(targets=(TargetGroup.DENSE_MLP,))
    model = add_adapter(load_base(bases["qwen3.5"], method="lora"), lora)
    save_adapter(model, "tiny/qwen3.5", tmp_path / "adapter")
    with pytest.raises(EngineError):
        load_adapter(load_base(bases["qwen3-next"], method="lora"), tmp_path / "adapter")
    with pytest.raises(EngineError, match="cannot be loaded"):
        load_adapter(load_base(bases["qwen3.5"], method="lora"), tmp_path)


def test_a_group_that_the_model_lacks_is_refused(bases: dict[str, Path]) -> None:
    lora = LoraSpec(targets=(TargetGroup.SHARED_EXPERT,))
    with pytest.raises(InputError, match="shared_expert matches nothing"):
        add_adapter(load_base(bases["qwen3.5"], method="lora"), lora)


# ---- find_base --------------------------------------------------------------------------------


def copy_base(base: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(base, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def test_a_local_folder_is_taken_as_it_is(home: Home, bases: dict[str, Path]) -> None:
    assert find_base(ModelRef(id=str(bases["qwen3.5"])), home) == bases["qwen3.5"].resolve()


def test_unknown_tiny_model_and_missing_folder_are_named(home: Home) -> None:
    with pytest.raises(NotFoundError, match="no tiny model 'tiny/nope'"):
        find_base(ModelRef(id="tiny/nope"), home)
    with pytest.raises(NotFoundError, match="There is no folder /nowhere"):
        find_base(ModelRef(id="/nowhere"), home)
    with pytest.raises(NotFoundError, match="on the Hugging Face hub"):
        find_base(ModelRef(id="not a hub id"), home)


def test_foreign_quantised_and_pickled_weights_are_refused(
    home: Home, bases: dict[str, Path], tmp_path: Path
) -> None:
    llama = copy_base(bases["qwen3.5"], tmp_path / "llama", model_type="llama")
    with pytest.raises(InputError, match="'llama'"):
        find_base(ModelRef(id=str(llama)), home)
    method = {"quant_method": "fp8"}
    fp8 = copy_base(bases["qwen3.5"], tmp_path / "fp8", quantization_config=method)
    with pytest.raises(InputError, match=r"quantised already \(fp8\)"):
        find_base(ModelRef(id=str(fp8)), home)
    pickled = copy_base(bases["qwen3.5"], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle"):
        find_base(ModelRef(id=str(pickled)), home)
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        find_base(ModelRef(id=str(pickled)), home)
    (pickled / "config.json").unlink()
    with pytest.raises(InputError, match=r"no readable config.json"):
        find_base(ModelRef(id=str(pickled)), home)


def test_missing_tensors_and_broken_files_stop_the_load(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    lacking = copy_base(bases["qwen3.5"], tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"lack 1 tensors.*layers\.1\.mlp\.up_proj"):
        load_base(lacking, method="lora")
    (lacking / "model.safetensors").write_bytes(b"half a download")
    with pytest.raises(EngineError, match="cannot be read"):
        load_base(lacking, method="lora")


def test_a_tokenizer_without_template_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_base(bases["qwen3.5"], tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(EngineError, match="no chat template"):
        load_tokenizer(folder)
    with pytest.raises(EngineError, match="cannot be read"):
        load_tokenizer(tmp_path)
