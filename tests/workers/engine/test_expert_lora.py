"""LoRA on experts and all other groups beside stock PEFT: the same files, numbers and gradients."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from studio.domain.lora_spec import LoraSpec
from studio.domain.targets import TargetGroup
from studio.errors import EngineError
from tests.workers.engine.checkpoints import WITH_EXPERTS
from tests.workers.engine.op_probe import OpProbe
from tests.workers.engine.small_bases import TOKENS, fill, logits, save_base
from workers.engine.checkpoint import save_adapter
from workers.engine.expert_lora import ParamWrapper
from workers.engine.lora import add_adapter, base_of, load_adapter, lora_layers
from workers.engine.loss import supervised_loss
from workers.engine.model import load_base
from workers.engine.quantize import expert_weight, nf4_states

EXPERT_TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS_ONLY = (TargetGroup.ROUTED_EXPERTS,)
UNHEEDED = "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small base of every family with experts: 8 of them, never as many as a rank."""
    root = tmp_path_factory.mktemp("mixtures")
    return {family: save_base(family, root / family) for family in WITH_EXPERTS}


def groups_of(family: str) -> tuple[TargetGroup, ...]:
    # Not the shared expert: stock PEFT moves it elsewhere on Qwen3-Next (peft#3711).
    groups = [*EXPERTS_ONLY, TargetGroup.ROUTER, TargetGroup.ATTENTION]
    groups += [TargetGroup.EMBEDDINGS, TargetGroup.HEAD]
    return tuple(groups if family == "qwen3_moe" else [*groups, TargetGroup.DELTA_NET])


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(TOKENS, use_cache=False).logits
    loss = nn.functional.cross_entropy(out[0, :-1], TOKENS[0, 1:])
    torch.autograd.backward(loss)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(name.count(".lora_") == 1 for name in found)
    return found


def assert_near(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert float((tensor - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()), name


def stock(folder: Path, adapter: Path) -> Any:
    """Load base and Adapter with transformers and PEFT alone, ready to train."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


@pytest.mark.filterwarnings(UNHEEDED)
@pytest.mark.parametrize("family", WITH_EXPERTS)
@pytest.mark.parametrize("choice", [{}, {"expert_rank": "divided", "rslora": True}])
def test_stock_peft_loads_trains_and_merges_what_we_save(
    family: str, choice: dict[str, Any], mixtures: dict[str, Path], tmp_path: Path
) -> None:
    lora = LoraSpec(rank=3, alpha=7, targets=groups_of(family), **choice)
    ours = add_adapter(load_base(mixtures[family], method="lora"), lora)
    fill(ours)
    save_adapter(ours, "small", tmp_path / "adapter")
    theirs = stock(mixtures[family], tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["mlp.gate.weight", *EXPERT_TARGETS]
    expected = logits(ours)
    assert_equal(logits(theirs), expected)
    assert_near(gradients(ours), gradients(theirs))
    plain = logits(load_base(mixtures[family], method="lora"))
    assert float((plain - expected).abs().max()) > 0.1
    assert_equal(logits(theirs.merge_and_unload()), expected)
    again = load_adapter(load_base(mixtures[family], method="lora"), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_over_experts_in_four_bits_it_is_peft_over_the_dequantised_ones(
    family: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    base = load_base(mixtures[family], method="qlora")
    dense = AutoModelForCausalLM.from_pretrained(mixtures[family], dtype=torch.float32)
    for name, module in base.named_modules():
        for weight in nf4_states(module):
            target = dense.get_parameter(f"{name}.{weight}")
            target.data = expert_weight(module, weight, torch.float32)
        if type(module).__name__ == "Linear4bit":
            identity = torch.eye(module.in_features)
            dense.get_parameter(f"{name}.weight").data = module(identity).detach().T.contiguous()
    ours = add_adapter(base, LoraSpec(rank=3, alpha=7, targets=EXPERTS_ONLY))
    assert all(isinstance(layer, ParamWrapper) for layer in lora_layers(ours).values())
    fill(ours)
    save_adapter(ours, "small", tmp_path / "adapter")
    theirs: Any = PeftModel.from_pretrained(dense, tmp_path / "adapter", is_trainable=True)
    assert_equal(logits(theirs), logits(ours))
    assert_near(gradients(ours), gradients(theirs))
    one = TOKENS[:, :1]  # few enough to dequantise their own experts alone
    assert_equal(logits(ours, one), logits(theirs, one))


@pytest.mark.parametrize("targets", [EXPERT_TARGETS, ["down_proj"], ["gate_up_proj"]])
def test_an_adapter_that_stock_peft_made_gives_its_logits(
    targets: list[str], mixtures: dict[str, Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(mixtures["qwen3_5_moe_text"], dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], target_parameters=targets
    )
    theirs = get_peft_model(base, config)
    fill(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = load_adapter(load_base(mixtures["qwen3_5_moe_text"], method="lora"), tmp_path)
    assert_equal(logits(ours), logits(theirs.eval()))


def test_single_layers_can_be_named(mixtures: dict[str, Path], tmp_path: Path) -> None:
    folder = mixtures["qwen3_moe"]
    name = "layers.1.mlp.experts.down_proj"
    ours = add_adapter(
        load_base(folder, method="lora"), LoraSpec(rank=3, targets=(), modules=(name,))
    )
    assert list(lora_layers(ours)) == [f"model.{name}"]
    fill(ours)
    save_adapter(ours, "small", tmp_path / "adapter")
    theirs = stock(folder, tmp_path / "adapter")
    assert_equal(logits(theirs), logits(ours))


def test_a_divided_rank_keeps_the_strength(mixtures: dict[str, Path]) -> None:
    def scaling(rslora: bool) -> tuple[int, float]:
        lora = LoraSpec(rank=6, alpha=9, targets=EXPERTS_ONLY, expert_rank="divided", rslora=rslora)
        model = add_adapter(load_base(mixtures["qwen3_moe"], method="lora"), lora)
        layer: Any = lora_layers(model)["model.layers.0.mlp.experts.down_proj"]
        return layer.r["default"], layer.scaling["default"]

    # Two experts of a token: rank 3, alpha 4.5.
    assert scaling(rslora=False) == (3, 1.5)
    assert scaling(rslora=True) == (3, 4.5 / math.sqrt(3))


def test_recomputing_layers_changes_no_gradient(mixtures: dict[str, Path]) -> None:
    groups = (*EXPERTS_ONLY, TargetGroup.ROUTER)
    base = load_base(mixtures["qwen3_next"], method="qlora")
    model = add_adapter(base, LoraSpec(rank=3, targets=groups)).train()
    fill(model)
    expected = gradients(model)
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert_near(gradients(model), expected)


def test_switched_off_or_taken_out_it_leaves_the_base(mixtures: dict[str, Path]) -> None:
    model = add_adapter(
        load_base(mixtures["qwen3_next"], method="qlora"), LoraSpec(rank=3, targets=EXPERTS_ONLY)
    )
    plain = logits(model)
    fill(model)
    assert not torch.allclose(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    with pytest.raises(EngineError, match="cannot be merged into experts in 4 bits"):
        model.merge_adapter()
    bare: Any = model.unload()
    assert torch.equal(logits(bare), plain)


def test_an_adapter_of_another_model_is_refused_in_a_sentence(
    mixtures: dict[str, Path], tmp_path: Path
) -> None:
    model = add_adapter(
        load_base(mixtures["qwen3_moe"], method="lora"), LoraSpec(rank=3, targets=EXPERTS_ONLY)
    )
    save_adapter(model, "small", tmp_path / "adapter")
    config = AutoConfig.from_pretrained(mixtures["qwen3_moe"])
    config.num_experts = 9
    from_config: Any = AutoModelForCausalLM.from_config
    wider = from_config(config)
    with pytest.raises(EngineError, match=r"another shape.*\(24, 64\) for \(27, 64\)"):
        load_adapter(wider, tmp_path / "adapter")
    config.num_hidden_layers = 3
    deeper = from_config(config)
    with pytest.raises(EngineError, match=r"4 tensors are missing, as .*layers\.2\.mlp\.experts"):
        load_adapter(deeper, tmp_path / "adapter")


def test_two_adapters_at_once_are_refused(mixtures: dict[str, Path]) -> None:
    base = load_base(mixtures["qwen3_moe"], method="lora")
    model = add_adapter(base, LoraSpec(rank=3, targets=EXPERTS_ONLY))
    layer: Any = next(iter(lora_layers(model).values()))
    layer.lora_A["other"], layer.lora_B["other"] = layer.lora_A["default"], layer.lora_B["default"]
    layer._active_adapter = ["default", "other"]  # noqa: SLF001
    with pytest.raises(EngineError, match="default, other are on at once"):
        layer.low_rank()


# ---- the probe --------------------------------------------------------------------------------

VOCABULARY, LENGTH, NUM_EXPERTS = 4096, 256, 32


def probed_model(implementation: str) -> Any:
    config = AutoConfig.for_model(
        "qwen3_next",
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    from_config: Any = AutoModelForCausalLM.from_config
    model = from_config(config)
    model.set_experts_implementation(implementation)
    return model


def probe_step(model: Any) -> tuple[OpProbe, OpProbe]:
    """Return what forward and backward of one example write, the loss being the studio's."""
    base: Any = base_of(model)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH))
    labels = tokens.clone()
    labels[:, : LENGTH // 2] = -100
    head = base.get_output_embeddings()
    with OpProbe() as forward:
        hidden = base.get_decoder()(input_ids=tokens).last_hidden_state
        loss = supervised_loss(hidden, labels, head, num_supervised=LENGTH // 2)
    with OpProbe() as backward:
        torch.autograd.backward(loss)
    return forward, backward


def count_stacks(probe: OpProbe) -> int:
    full = [(NUM_EXPERTS, 128, 128), (NUM_EXPERTS, 128, 64)]
    full += [(shape[0], shape[2], shape[1]) for shape in full]
    return sum(count for shape, count in probe.shapes.items() if shape in full)


def test_a_step_writes_no_stack_of_experts_and_no_logits_of_all_tokens() -> None:
    lora = LoraSpec(rank=4, targets=EXPERTS_ONLY, modules=("self_attn.q_proj", "self_attn.v_proj"))
    ours = probe_step(add_adapter(probed_model("grouped_mm"), lora))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=EXPERT_TARGETS)
    theirs = probe_step(get_peft_model(probed_model("grouped_mm"), config))
    assert [count_stacks(probe) for probe in ours] == [0, 0]
    assert [count_stacks(probe) for probe in theirs] == [16, 8]
    for shape in ours[0].shapes | ours[1].shapes:
        assert not (shape[-1:] == (VOCABULARY,) and math.prod(shape) > VOCABULARY * LENGTH // 2)
    # The whole model, its delta nets with their backward included. Measured with this probe and
    # torch 2.13: 2,805 operations and 131 MiB; PEFT 0.21.2 beside grouped_mm, with the loss of
    # transformers: 2,723 and 175; beside the loop over experts: 9,235 and 962.
    assert sum(probe.ops.total() for probe in ours) <= 2850
    assert sum(probe.num_bytes for probe in ours) <= 135 * 2**20
    assert sum(p.num_bytes for p in ours) < 0.85 * sum(p.num_bytes for p in theirs)
