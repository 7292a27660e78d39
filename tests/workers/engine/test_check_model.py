"""What is wrong with a model folder is said before any memory is taken."""

import json
import math
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.disk import TEMPLATES
from studio.errors import InputError
from tests.workers.engine.checkpoints import CONFIGS, WITH_EXPERTS, write_checkpoint
from workers.engine.check_model import INDEX, check_folder, read_heads, template_for

NAME = "org/model"


@pytest.fixture
def folder(tmp_path: Path, bases: dict[str, Path]) -> Path:
    return write_checkpoint("qwen3_5_moe_text", tmp_path / "base", bases["qwen3.5"], fused=True)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_text(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", text_config={**config["text_config"], **values})


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def refused(folder: Path, match: str) -> InputError:
    with pytest.raises(InputError, match=match) as caught:
        check_folder(folder, NAME)
    assert caught.value.hint
    assert caught.value.field == "model.id"
    return caught.value


@pytest.mark.parametrize(
    ("family", "fused"), [*((f, False) for f in CONFIGS), *((f, True) for f in WITH_EXPERTS)]
)
def test_published_layouts_pass_and_only_heads_are_read(
    family: str, fused: bool, tmp_path: Path, bases: dict[str, Path]
) -> None:
    folder = write_checkpoint(family, tmp_path / "base", bases["qwen3.5"], fused=fused)
    heads = read_heads(folder, NAME)
    tensors = {k: v for shard in folder.glob("*.safetensors") for k, v in load_file(shard).items()}
    assert {name: head.shape for name, head in heads.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert check_folder(folder, NAME) == folder


def test_only_heads_are_read(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = write_checkpoint("qwen3", tmp_path / "base", bases["qwen3.5"])
    rows = 2 * 10**9  # 256 GB an embedding: files of holes, which take no room on the disk
    change(folder / "config.json", vocab_size=rows)
    for shard in folder.glob("*.safetensors"):
        size = int.from_bytes(shard.read_bytes()[:8], "little")
        header = json.loads(shard.read_bytes()[8 : 8 + size])
        header.pop("__metadata__", None)
        end = 0
        for name, tensor in header.items():
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensor["shape"] = [rows, 64]
            length = 2 * math.prod(tensor["shape"])
            tensor["data_offsets"], end = [end, end + length], end + length
        text = json.dumps(header).encode()
        shard.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(shard, 8 + len(text) + end)
    start = time.perf_counter()
    assert check_folder(folder, NAME) == folder
    assert time.perf_counter() - start < 5


def test_every_base_of_the_studio_passes(bases: dict[str, Path]) -> None:
    for base in bases.values():
        assert check_folder(base, NAME) == base


# ---- config -------------------------------------------------------------------------------------


def test_a_config_that_is_none_is_refused(folder: Path) -> None:
    for text in ("{", "[]", "\x00"):
        (folder / "config.json").write_text(text)
        refused(folder, "no readable config.json")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused(folder, "no readable config.json")
    (folder / "config.json").unlink()
    refused(folder, "no readable config.json")


def test_another_architecture_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(folder, "'llama'")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_repository_is_never_run(file: str, folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit('this ran')")
    change(folder / file, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    error = refused(folder, f"auto_map in its {file}")
    assert "no setting allows it" in error.hint


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors"])
def test_quantised_weights_are_refused_by_their_config(method: str, folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": method})
    assert "16-bit" in refused(folder, f"quantised already \\({method}\\)").hint


def test_quantised_weights_are_refused_wherever_the_config_says_it(folder: Path) -> None:
    change_text(folder, quantization_config={"quant_method": "fp8"})
    refused(folder, "quantised already")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_weights_are_refused_by_their_bytes(dtype: torch.dtype, folder: Path) -> None:
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = tensors[name].to(dtype)
            save_file(tensors, shard)
    refused(folder, "quantised already")


@pytest.mark.parametrize(
    "lie",
    [
        {"moe_intermediate_size": 128},
        {"num_experts": 16},
        {"hidden_size": 128},
        {"num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2},
        {
            "num_hidden_layers": 4,
            "layer_types": [*["linear_attention"] * 2, *["full_attention"] * 2],
        },
        {"vocab_size": 256},
        {"head_dim": 64},
    ],
    ids=lambda lie: next(iter(lie)),
)
def test_a_config_that_lies_about_its_shapes_is_refused(lie: dict[str, Any], folder: Path) -> None:
    change_text(folder, **lie)
    refused(folder, "config.json")


# ---- files --------------------------------------------------------------------------------------


def test_missing_shards_are_counted_and_named(folder: Path) -> None:
    first_shard(folder).unlink()
    refused(folder, r"lacks 1 of 4 weight files, the first is model-00001-of-00004")


def test_half_downloaded_shards_are_refused(folder: Path) -> None:
    shard = first_shard(folder)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused(folder, f"has {len(whole) - 1:,} bytes, but its header says {len(whole):,}")
    shard.write_bytes(whole + b"more")
    refused(folder, "but its header says")
    for half in (whole[:100], whole[:5], b""):
        shard.write_bytes(half)
        refused(folder, "no whole safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"not JSON",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "BF16", "shape": "x", "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": []}}',
        b'{"a": {"dtype": "BF16", "shape": [1]}}',
    ],
)
def test_corrupt_headers_are_refused(header: bytes, folder: Path) -> None:
    first_shard(folder).write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, "no whole safetensors file")


def test_a_header_that_asks_for_all_memory_is_refused(folder: Path) -> None:
    first_shard(folder).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(folder, "no whole safetensors file")


def test_a_damaged_index_is_refused(folder: Path) -> None:
    index = folder / INDEX
    whole = json.loads(index.read_text())
    for text in (
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": "../b.safetensors"}}',
    ):
        index.write_text(text)
        refused(folder, "no readable model.safetensors.index.json")
    whole["weight_map"]["model.ghost.weight"] = first_shard(folder).name
    index.write_text(json.dumps(whole))
    refused(folder, r"lacks 1 tensors that its index names, the first is model\.ghost")


def test_a_tensor_that_is_missing_is_named(folder: Path) -> None:
    name = "model.language_model.layers.1.mlp.gate.weight"
    index = json.loads((folder / INDEX).read_text())
    shard = folder / index["weight_map"].pop(name)
    (folder / INDEX).write_text(json.dumps(index))
    save_file({k: v for k, v in load_file(shard).items() if k != name}, shard)
    refused(folder, r"layers\.1\.mlp\.gate\.weight")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused(file: str, folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    refused(folder, r"no \*\.safetensors")
    (folder / file).write_bytes(b"\x80\x04.")
    refused(folder, "pickle files, which can run code")


def test_an_adapter_alone_is_no_model(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert "Adapter" in refused(folder, "neither model.safetensors nor").hint


def test_a_model_without_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    refused(folder, "no readable tokenizer_config.json")
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer.json")


# ---- template -----------------------------------------------------------------------------------


def test_a_base_without_template_is_offered_that_of_its_family(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    expected = {
        "qwen3_next": "qwen3-next-instruct.jinja",
        "qwen3_5_text": "qwen3.5.jinja",
        "qwen3_5_moe_text": "qwen3.5.jinja",
        "qwen3": "qwen3.jinja",
        "qwen3_moe": "qwen3.jinja",
    }
    for family, name in expected.items():
        folder = write_checkpoint(family, tmp_path / family, bases["qwen3.5"])
        assert template_for(folder) is None
        (folder / "chat_template.jinja").unlink()
        assert template_for(folder) == TEMPLATES / "chat" / name
        change(folder / "tokenizer_config.json", chat_template="{{ messages }}")
        assert template_for(folder) is None
