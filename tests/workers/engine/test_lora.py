"""Which layers carry a LoRA, in every family and of every kind, and the Adapter on disk."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file, save_file

from studio.domain.lora_spec import LoraSpec
from studio.domain.targets import TargetGroup, lora_parameters, selected
from studio.errors import EngineError, InputError
from tests.workers.engine.small_bases import GROUPS, fill, logits, save_base
from workers.engine.checkpoint import save_adapter
from workers.engine.lora import (
    adapter_state,
    add_adapter,
    base_of,
    check_adapted,
    load_adapter,
    lora_layers,
    selected_modules,
    set_adapter_state,
)
from workers.engine.model import load_base

FAMILIES = tuple(GROUPS)
Method = Literal["qlora", "lora"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a small base of each family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: save_base(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_adapted_layers_are_the_selected_ones_and_train_what_was_counted(
    family: str, method: Method, bases: dict[str, Path]
) -> None:
    # Each group alone, too: PEFT moves some of them, and knows experts only beside other layers.
    for groups in (GROUPS[family], *((group,) for group in GROUPS[family])):
        # A gate of two rows takes no larger rank, where it is alone.
        rank = 1 if groups[0].value.endswith(("gate", "gates")) else 3
        lora = LoraSpec(rank=rank, targets=groups, expert_rank="divided")
        base = load_base(bases[family], method=method)
        chosen = selected(base.config.to_dict(), lora)
        model = add_adapter(base, lora)
        assert set(lora_layers(model)) == {module.full_name for module in chosen}
        trainable, _ = model.get_nb_trainable_parameters()
        assert trainable == lora_parameters(chosen, lora)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained)


def test_peft_gets_its_table_back(bases: dict[str, Path]) -> None:
    table = vars(transformers_weight_conversion)["_MODEL_TO_CONVERSION_PATTERN"]
    before = dict(table)
    lora = LoraSpec(rank=4, targets=(TargetGroup.SHARED_EXPERT,))
    add_adapter(load_base(bases["qwen3_next"], method="lora"), lora)
    assert table == before
    assert before["qwen3_next"] == before["qwen3_moe"] == "qwen2_moe"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_saved_adapter_gives_the_same_logits(
    family: str, method: Method, bases: dict[str, Path], tmp_path: Path
) -> None:
    lora = LoraSpec(rank=4, targets=GROUPS[family])
    model = add_adapter(load_base(bases[family], method=method), lora)
    fill(model)
    model.train(False)
    expected = logits(model)
    save_adapter(model, f"tiny/{family}", tmp_path / "adapter")
    again = load_adapter(load_base(bases[family], method=method), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert not torch.allclose(logits(load_base(bases[family], method=method)), expected)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"tiny/{family}"
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == adapter_state(again).keys()
    assert all(".lora_" in name for name in saved)  # no copy of embeddings or head


def test_dora_trains_and_comes_back(bases: dict[str, Path], tmp_path: Path) -> None:
    groups = (TargetGroup.ATTENTION, TargetGroup.DELTA_NET, TargetGroup.HEAD)
    lora = LoraSpec(rank=4, targets=groups, dora=True)
    model = add_adapter(load_base(bases["qwen3_5_text"], method="qlora"), lora)
    fill(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    save_adapter(model, "small", tmp_path / "adapter")
    again = load_adapter(load_base(bases["qwen3_5_text"], method="qlora"), tmp_path / "adapter")
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    assert any("magnitude" in name for name in adapter_state(again))


@pytest.mark.parametrize("choice", [{"dropout": 0.1}, {"dora": True}], ids=["dropout", "dora"])
def test_what_peft_cannot_do_on_experts_is_refused(
    choice: dict[str, Any], bases: dict[str, Path]
) -> None:
    lora = LoraSpec(rank=4, targets=(TargetGroup.ROUTED_EXPERTS,), **choice)
    with pytest.raises(InputError, match="cannot be used on routed_experts"):
        add_adapter(load_base(bases["qwen3_moe"], method="lora"), lora)


def test_other_layers_than_selected_are_told(bases: dict[str, Path]) -> None:
    base = load_base(bases["qwen3_next"], method="lora")
    groups = (TargetGroup.ATTENTION, TargetGroup.ROUTED_EXPERTS, TargetGroup.ROUTER)
    lora = LoraSpec(rank=4, targets=groups)
    names = selected_modules(base, lora)
    model = add_adapter(base, lora)
    with pytest.raises(EngineError, match=r"1 selected layers carry no LoRA, as model\.ghost"):
        check_adapted(model, [*names, "model.ghost"])
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate"):
        full = f"model.layers.0.{name}"
        with pytest.raises(EngineError, match=f"not selected, as {full}"):
            check_adapted(model, [other for other in names if other != full])


def test_state_comes_back_bit_for_bit_or_not_at_all(bases: dict[str, Path]) -> None:
    lora = LoraSpec(rank=4, targets=GROUPS["qwen3_next"])
    model = add_adapter(load_base(bases["qwen3_next"], method="qlora"), lora)
    fill(model)
    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    for broken, said in (
        ({**state, "base_model.model.ghost": torch.zeros(1)}, "1 have no place"),
        (dict(list(state.items())[1:]), "1 tensors are missing"),
        ({name: tensor[:1] for name, tensor in state.items()}, "have another shape"),
    ):
        with pytest.raises(EngineError, match=said):
            set_adapter_state(model, broken)
    assert not any(tensor.any() for tensor in adapter_state(model).values())
    set_adapter_state(model, state)
    again = adapter_state(model)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_an_adapter_of_another_family_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    lora = LoraSpec(rank=4, targets=(TargetGroup.DENSE_MLP,))
    model = add_adapter(load_base(bases["qwen3_5_text"], method="lora"), lora)
    save_adapter(model, "tiny/qwen3.5", tmp_path / "adapter")
    with pytest.raises(EngineError, match="cannot be loaded"):
        load_adapter(load_base(bases["qwen3_next"], method="lora"), tmp_path / "adapter")
    with pytest.raises(EngineError, match="cannot be loaded"):
        load_adapter(load_base(bases["qwen3_5_text"], method="lora"), tmp_path)


def test_pickles_other_methods_and_changed_bases_are_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = load_base(bases["qwen3"], method="lora")
    model = add_adapter(base, LoraSpec(rank=4, targets=(TargetGroup.ATTENTION,)))
    save_adapter(model, "small", tmp_path)
    config = tmp_path / "adapter_config.json"
    values = json.loads(config.read_text())
    for change, said in (
        ({**values, "init_lora_weights": "pissa"}, "changes the base itself"),
        ({"peft_type": "LOHA"}, "no LoRA"),
    ):
        config.write_text(json.dumps(change))
        with pytest.raises(EngineError, match=said):
            load_adapter(load_base(bases["qwen3"], method="lora"), tmp_path)
    config.write_text(json.dumps(values))
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(EngineError, match="cannot be loaded"):
        load_adapter(load_base(bases["qwen3"], method="lora"), tmp_path)


def test_copies_of_the_embeddings_that_peft_saves_are_taken(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens", "q_proj"])
    theirs: Any = get_peft_model(load_base(bases["qwen3"], method="lora"), config)
    fill(theirs)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[name] = 2 * theirs.state_dict()[name]
    save_file(tensors, file, metadata={"format": "pt"})
    ours = load_adapter(load_base(bases["qwen3"], method="lora"), tmp_path)
    found: Any = base_of(ours).get_input_embeddings()
    assert torch.equal(found.base_layer.weight, tensors[name])


def test_a_group_that_the_model_lacks_is_refused(bases: dict[str, Path]) -> None:
    lora = LoraSpec(targets=(TargetGroup.ROUTED_EXPERTS,))
    with pytest.raises(InputError, match="routed_experts matches nothing"):
        add_adapter(load_base(bases["qwen3_5_text"], method="lora"), lora)


def test_the_head_trains_through_the_loss_of_the_studio(bases: dict[str, Path]) -> None:
    base = load_base(bases["qwen3"], method="lora")
    model = add_adapter(base, LoraSpec(rank=4, targets=(TargetGroup.HEAD,)))
    head: Any = base_of(model).get_submodule("lm_head")
    head(torch.randn(2, 64)).sum().backward()
    assert head.lora_B["default"].weight.grad.abs().sum() > 0
