"""4 bits really are 4 bits: every layout, bit for bit, in little memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from studio.errors import EngineError
from tests.workers.engine.checkpoints import CONFIGS, WITH_EXPERTS, write_checkpoint
from tests.workers.engine.live_bytes import LiveBytes
from workers.engine.model import load_base
from workers.engine.quantize import (
    EXPERT_WEIGHTS,
    SIXTEEN_BIT,
    expert_weight,
    four_bit_tensors,
    nf4_states,
    quantise_experts,
    refuse_ragged_rows,
)

LAYOUTS = [
    *((family, False) for family in CONFIGS),
    ("qwen3_5_moe_text", True),
]
TOKENS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]
) -> dict[tuple[str, bool], Path]:
    """One folder for each family and layout."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        (family, fused): write_checkpoint(
            family, root / f"{family}-{fused}", bases["qwen3.5"], fused=fused
        )
        for family, fused in LAYOUTS
    }


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if n.endswith("mlp.experts")}


@pytest.mark.parametrize(("family", "fused"), LAYOUTS)
def test_every_weight_has_the_bits_that_bitsandbytes_gives_for_the_whole_of_it(
    family: str, fused: bool, checkpoints: dict[tuple[str, bool], Path]
) -> None:
    folder = checkpoints[family, fused]
    fine, coarse = load_base(folder, method="lora"), load_base(folder, method="qlora")
    found = dict(four_bit_tensors(coarse))
    linear = {
        f"{name}.weight"
        for name, module in fine.named_modules()
        if type(module) is nn.Linear and not name.endswith(SIXTEEN_BIT)
    }
    experts = {name for name, _ in fine.named_parameters() if name.endswith(EXPERT_WEIGHTS)}
    assert set(found) == linear | experts
    assert bool(experts) == (family in WITH_EXPERTS)
    for name, parameter in found.items():
        packed, state = quantize_4bit(
            fine.get_parameter(name).detach(), compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(parameter.data, packed)
        ours, theirs = (s.as_dict(packed=True) for s in (parameter.quant_state, state))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    others = {n: p for n, p in coarse.named_parameters() if n not in found}
    assert all(torch.equal(p, fine.get_parameter(n)) for n, p in others.items())
    assert not any(p.requires_grad for p in coarse.parameters())
    assert coarse.num_parameters() == fine.num_parameters()
    for module in coarse.modules():
        assert not (isinstance(module, Linear4bit) and module.support_avx512bf16_for_cpu)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_it_computes_what_its_dequantised_weights_compute(
    family: str, checkpoints: dict[tuple[str, bool], Path]
) -> None:
    coarse = load_base(checkpoints[family, False], method="qlora")
    fine = load_base(checkpoints[family, False], method="lora")
    before = fine(TOKENS, use_cache=False).logits
    for name, parameter in four_bit_tensors(coarse):
        fine.get_parameter(name).data = dequantize_4bit(parameter.data, parameter.quant_state)
    expected = fine(TOKENS, use_cache=False).logits
    logits = coarse(TOKENS, use_cache=False).logits
    assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_the_states_lie_on_the_experts_module_and_follow_it(
    checkpoints: dict[tuple[str, bool], Path],
) -> None:
    model = load_base(checkpoints["qwen3_next", False], method="qlora")
    module = next(iter(experts_of(model).values()))
    states = vars(module)["nf4_states"]
    assert states is nf4_states(module)
    assert set(states) == {"gate_up_proj", "down_proj"}
    weight = expert_weight(module, "gate_up_proj", torch.bfloat16)
    assert weight.shape == (8, 128, 64)
    assert weight.dtype == torch.bfloat16
    # What Module.to does to each parameter; one state serves both.
    vars(module)["_parameters"]["gate_up_proj"].to("meta")
    assert states["gate_up_proj"].absmax.is_meta
    assert states["gate_up_proj"].state2.absmax.is_meta
    assert not states["down_proj"].absmax.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_in_4_bits_moves_to_a_card_and_loads_there(
    checkpoints: dict[tuple[str, bool], Path],
) -> None:
    folder = checkpoints["qwen3_next", False]
    model = load_base(folder, method="qlora")
    module = next(iter(experts_of(model).values()))
    expected = expert_weight(module, "gate_up_proj", torch.float32)
    apart = copy.deepcopy(module)  # bitsandbytes copies the state of a parameter once more
    for moved in (apart.to("cuda"), module.to("cuda")):
        weight = expert_weight(moved, "gate_up_proj", torch.float32)
        assert weight.is_cuda
        assert torch.allclose(weight.cpu(), expected, atol=1e-6)
    there = load_base(folder, method="qlora", device="cuda")
    weight = expert_weight(
        next(iter(experts_of(there).values())), "gate_up_proj", torch.float32
    ).cpu()
    assert torch.allclose(weight, expected, atol=2e-3, rtol=1e-2)


def test_plain_experts_are_handed_out_as_they_are(
    checkpoints: dict[tuple[str, bool], Path],
) -> None:
    model = load_base(checkpoints["qwen3_moe", False], method="lora")
    module: Any = next(iter(experts_of(model).values()))
    assert nf4_states(module) == {}
    given = expert_weight(module, "down_proj", torch.float32)
    assert given.data_ptr() == module.down_proj.data_ptr()


# ---- memory -------------------------------------------------------------------------------------


def bytes_of(model: nn.Module) -> int:
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for parameter in model.parameters():
        if isinstance(parameter, Params4bit):
            parts = parameter.quant_state.as_dict(packed=True).values()
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


def layer_bytes(model: nn.Module) -> int:
    return sum(
        p.numel() * p.element_size() for n, p in model.named_parameters() if ".layers.1." in n
    )


@pytest.mark.parametrize(
    ("family", "fused", "share"),
    [("qwen3_next", False, 0.25), ("qwen3_5_moe_text", True, 0.75), ("qwen3_5_text", False, 0.5)],
)
def test_loading_takes_the_quantised_weights_and_less_than_one_layer(
    family: str,
    fused: bool,
    share: float,
    checkpoints: dict[tuple[str, bool], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoints[family, fused]
    layer = layer_bytes(load_base(folder, method="lora"))
    with LiveBytes() as live:
        coarse = load_base(folder, method="qlora")
    assert bytes_of(coarse) < live.peak < bytes_of(coarse) + share * layer
    # The same count sees what a load in 16 bits holds, when that happens in this thread.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with LiveBytes() as live:
        fine = load_base(folder, method="lora")
    assert live.peak > bytes_of(coarse) + 1.5 * layer
    assert live.peak >= 0.7 * bytes_of(fine)


def test_packed_bytes_may_be_kept_as_floats(checkpoints: dict[tuple[str, bool], Path]) -> None:
    folder = checkpoints["qwen3_next", False]
    small = dict(four_bit_tensors(load_base(folder, method="qlora")))
    model: Any = load_base(folder, method="qlora", storage=torch.float32)
    for name, parameter in four_bit_tensors(model):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.data.view(torch.uint8).view(-1), small[name].data.view(-1))
    with pytest.raises(ValueError, match="cast"):
        model.to(dtype=torch.bfloat16)


# ---- what is refused ----------------------------------------------------------------------------


def test_a_config_that_lies_about_its_experts_stops_the_load(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    for family, fused in (("qwen3_next", False), ("qwen3_next", True), ("qwen3", False)):
        folder = write_checkpoint(
            family, tmp_path / f"{family}-{fused}", bases["qwen3.5"], fused=fused
        )
        config = folder / "config.json"
        text = config.read_text()
        sizes = ("moe_intermediate_size", 64, 128) if family != "qwen3" else ("head_dim", 32, 64)
        changed = text.replace(f'"{sizes[0]}": {sizes[1]}', f'"{sizes[0]}": {sizes[2]}')
        assert changed != text
        config.write_text(changed)
        with pytest.raises(EngineError):
            load_base(folder, method="qlora")


def test_a_linear_layer_of_another_shape_stops_the_load(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    # transformers itself looks at no shape that it quantises: this one would load.
    folder = write_checkpoint("qwen3", tmp_path / "odd", bases["qwen3.5"])
    name = "model.layers.1.mlp.up_proj.weight"
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = tensors[name].view(64, 128).contiguous()
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(EngineError, match="cannot be read"):
        load_base(folder, method="qlora")


def test_an_expert_that_is_missing_stops_the_load(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = write_checkpoint("qwen3_moe", tmp_path / "lacking", bases["qwen3.5"])
    (name,) = {"model.layers.1.mlp.experts.7.up_proj.weight"}
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop(name, None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"layers\.1\.mlp\.experts\.gate_up_proj.*missing"):
        load_base(folder, method="qlora")


def test_experts_of_other_numbers_or_sizes_are_refused() -> None:
    shape = torch.Size((3, 4, 64))
    with pytest.raises(EngineError, match=r"config\.json"):
        quantise_experts(torch.randn(2, 4, 64), shape)
    with pytest.raises(EngineError, match=r"config\.json"):
        quantise_experts(torch.randn(4, 4, 64), shape)
    with pytest.raises(EngineError, match=r"config\.json"):
        quantise_experts(torch.randn(3, 2, 64), shape)
    with pytest.raises(EngineError, match="no multiple of 64"):
        quantise_experts(torch.randn(3, 3, 32), torch.Size((3, 3, 32)))


def test_who_asks_for_bitsandbytes_still_gets_it() -> None:
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is Bnb4BitHfQuantizer


def test_all_weights_train_in_full_fine_tuning(checkpoints: dict[tuple[str, bool], Path]) -> None:
    model = load_base(checkpoints["qwen3", False], method="full")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_rows_that_a_cpu_restores_wrongly_are_refused() -> None:
    weight = torch.randn(64, 96)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    error = float((dequantize_4bit(packed, state) - weight).norm() / weight.norm())
    assert error > 0.2  # when bitsandbytes mends it, the refusal can go

    with pytest.raises(EngineError, match="Rows of 96 weights, as in up_proj, cannot be held"):
        refuse_ragged_rows("up_proj", weight.shape, weight.device)
    refuse_ragged_rows("up_proj", (64, 128), weight.device)
