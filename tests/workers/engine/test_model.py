"""Quantisation, LoRA targets, adapters on disk, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.disk import Home
from studio.domain.spec import ModelRef
from studio.errors import EngineError, InputError, NotFoundError
from workers.engine.model import find_base, load_base, load_tokenizer

TOKENS = torch.arange(5, 45)[None]


def test_nf4_weights_are_near_the_sixteen_bit_ones_but_not_equal(bases: dict[str, Path]) -> None:
    fine = load_base(bases["qwen3.5"], method="lora")
    coarse = load_base(bases["qwen3.5"], method="qlora")
    name = "model.layers.0.mlp.up_proj"
    identity = torch.eye(fine.config.hidden_size)
    exact, rounded = fine.get_submodule(name)(identity), coarse.get_submodule(name)(identity)
    error = float((exact - rounded).norm() / exact.norm())
    # NF4 of a normal distribution, blocks of 64: about 0.09 (engine research, section 4.2).
    assert 0.05 < error < 0.13


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
