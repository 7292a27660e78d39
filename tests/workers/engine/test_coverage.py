"""The Proof of coverage counts what is there, and fails when something stayed in 16 bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.workers.engine.checkpoints import CONFIGS, WITH_EXPERTS, write_checkpoint
from workers.engine.coverage import Method, expect_coverage, prove_coverage
from workers.engine.model import load_base
from workers.engine.quantize import SIXTEEN_BIT, expert_weight, nf4_states


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("coverage")
    return {f: write_checkpoint(f, root / f, bases["qwen3.5"]) for f in CONFIGS}


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_expected_before_loading_is_measured_afterwards(
    family: str, folders: dict[str, Path]
) -> None:
    before = expect_coverage(folders[family], "qlora")
    fine = load_base(folders[family], method="lora")
    after = prove_coverage(load_base(folders[family], method="qlora"), "qlora")
    assert before.passed is None
    assert after.passed is True
    expected, measured = before.details["expected"], after.details["classes"]
    assert expected.keys() == measured.keys()
    for name, counts in expected.items():
        assert counts.items() <= measured[name].items()
    total = after.details["total"]
    assert total["parameters"] == sum(p.numel() for p in fine.parameters())
    assert before.details["share_expected"] == after.details["share_4bit"] > 0.8
    # NF4 with double quantisation: 4 bits a weight, 8 bits a block of 64, 32 bits every 256 blocks;
    # small tensors pay more for their constants.
    small = sum(1 for name in measured if name.endswith("Experts"))
    assert small == (family in WITH_EXPERTS)
    assert 0.516 <= total["bytes_4bit"] / total["parameters_4bit"] < 0.8
    assert f"{after.details['share_4bit']:.1%}" in before.summary
    assert f"{after.details['share_4bit']:.1%}" in after.summary


def test_a_weight_in_4_bits_takes_half_a_byte_and_its_constants(bases: dict[str, Path]) -> None:
    proof = prove_coverage(load_base(bases["qwen3-next"], method="qlora"), "qlora")
    total = proof.details["total"]
    assert total["bytes_4bit"] / total["parameters_4bit"] == pytest.approx(0.516, abs=0.01)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_left_in_16_bits_fail(family: str, folders: dict[str, Path]) -> None:
    settings = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=list(SIXTEEN_BIT),
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folders[family], dtype=torch.float32, quantization_config=settings
    )
    proof = prove_coverage(model, "qlora")
    assert proof.passed is False
    assert "layers.0.mlp.experts.gate_up_proj" in proof.summary
    assert "and 3 more" in proof.summary
    assert all(
        name.rpartition(".")[0].endswith("experts") for name in proof.details["left_in_16bit"]
    )
    assert proof.details["share_4bit"] < proof.details["share_expected"]


def test_one_dequantised_module_fails(folders: dict[str, Path]) -> None:
    model: Any = load_base(folders["qwen3_next"], method="qlora")
    assert prove_coverage(model, "qlora").passed is True
    mixer = model.model.layers[2].self_attn
    packed = mixer.o_proj.weight
    plain = nn.Linear(64, 64, bias=False)
    plain.weight.data = dequantize_4bit(packed.data, packed.quant_state)
    mixer.o_proj = plain
    proof = prove_coverage(model, "qlora")
    assert proof.passed is False
    assert proof.details["left_in_16bit"] == ["model.layers.2.self_attn.o_proj.weight"]


@pytest.mark.parametrize("keep_state", [False, True])
def test_one_dequantised_experts_weight_fails(keep_state: bool, folders: dict[str, Path]) -> None:
    model: Any = load_base(folders["qwen3_moe"], method="qlora")
    experts = model.model.layers[1].mlp.experts
    weight = expert_weight(experts, "down_proj", torch.float32)
    experts.down_proj = nn.Parameter(weight, requires_grad=False)
    if not keep_state:
        nf4_states(experts).pop("down_proj")
    proof = prove_coverage(model, "qlora")
    assert proof.passed is False
    assert proof.details["left_in_16bit"] == ["model.layers.1.mlp.experts.down_proj"]


def test_nothing_in_4_bits_fails_for_qlora_and_informs_otherwise(folders: dict[str, Path]) -> None:
    base = load_base(folders["qwen3_5_text"], method="lora")
    proof = prove_coverage(base, "qlora")
    assert proof.passed is False
    assert "Only 0.0%" in proof.summary
    words: dict[Method, str] = {"lora": "The base is held in ", "full": "All weights train; "}
    for method, begin in words.items():
        informs = prove_coverage(base, method)
        assert informs.passed is None
        assert informs.summary.startswith(begin)
        assert "will be in 4 bits" in expect_coverage(folders["qwen3_5_text"], method).summary


def test_the_precision_is_that_of_the_weights_in_memory(folders: dict[str, Path]) -> None:
    base: Any = load_base(folders["qwen3_5_text"], method="lora", device="cpu")
    assert "is held in float32; " in prove_coverage(base, "lora").summary
    base.to(torch.bfloat16)
    assert "is held in bfloat16; " in prove_coverage(base, "lora").summary
    assert "are loaded in bfloat16: " in prove_coverage(base, "full").summary
    base.model.norm.float()
    assert "is held in bfloat16 and float32; " in prove_coverage(base, "lora").summary


def test_a_tied_head_is_counted_once(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = write_checkpoint(
        "qwen3", tmp_path / "tied", bases["qwen3.5"], tie_word_embeddings=True
    )
    model = load_base(folder, method="qlora")
    proof = prove_coverage(model, "qlora")
    assert proof.passed is True
    assert proof.details["total"]["parameters"] == model.num_parameters()
