"""Whatever an Adapter in PEFT's layout holds, our merge is PEFT's own, for every family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from studio.disk import OrderFolder
from studio.errors import EngineError
from tests.workers.small_models import (
    EXPERT_TARGETS,
    EXPERTS,
    HIDDEN,
    INNER,
    RANK,
    fuse_experts,
    publish,
    save_adapter,
    save_model,
)
from workers.adapter import read_adapter
from workers.carried import changes_carried, summed_up
from workers.low_rank import ExpertsLowRank
from workers.meaning import meanings
from workers.merge import copy_other_files, write_weights
from workers.placing import place
from workers.shards import SINGLE, changed_tensors, find_shards, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
LINEAR = ["q_proj", "o_proj", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"self_attn.q_proj": 11},
    },
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "k_proj"]},
}
SHARED = {"target_modules": ["shared_expert.up_proj", "shared_expert_gate"]}
EXPERT_KINDS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": EXPERT_TARGETS},
    "in the other order": {"target_parameters": EXPERT_TARGETS[::-1]},
    "gate and up": {"target_parameters": EXPERT_TARGETS[:1]},
    "down": {"target_parameters": EXPERT_TARGETS[1:]},
    "of one layer": {"target_parameters": ["layers.1.mlp.experts.down_proj", EXPERT_TARGETS[0]]},
    "router": {"target_parameters": ["mlp.gate.weight"]},
    "everything": {
        "target_modules": ["q_proj", "embed_tokens"],
        "target_parameters": [*EXPERT_TARGETS, "mlp.gate.weight"],
    },
    "with a rank of their own": {
        "target_modules": ["q_proj"],
        "target_parameters": EXPERT_TARGETS,
        "rank_pattern": {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 1},
        "alpha_pattern": {"mlp.experts.gate_up_proj": 3.5},
        "use_rslora": True,
    },
}


def _merge(base: Path, adapter: Path, target: Path) -> Path:
    """Merge without a Certificate, which needs a tokenizer."""
    told = OrderFolder(path=target.parent)
    shards, read = find_shards(base), read_adapter(adapter)
    target.mkdir()
    write_weights(told, shards, read.changes, place(read, shards), target)
    copy_other_files(shards, target)
    return target


def _assert_equals_peft(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    wrapped = save_adapter(base, tmp_path / "adapter", **settings)
    merged = _merge(base, wrapped.folder, tmp_path / "merged")
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).state_dict()
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    theirs = wrapped.merged()

    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=name)
    changed = {name for name in before if not same_bits(before[name], ours[name])}
    assert changed == read_adapter(wrapped.folder).changes.keys()
    # What the Certificate measures agrees with PEFT's merge, too.
    written = find_shards(merged)
    shards = find_shards(base)
    carried = changes_carried(meanings(wrapped.folder, base), shards, written)
    summary = summed_up(carried, changed_tensors(shards, written))
    assert summary.targeted == summary.changed
    assert all(share == pytest.approx(1, abs=1e-6) for share in summary.kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3"])
def test_a_merge_of_layers_equals_peft(family: str, kind: str, tmp_path: Path) -> None:
    _assert_equals_peft(save_model(family, tmp_path / "base"), tmp_path, KINDS[kind])


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_a_merge_of_a_shared_expert_equals_peft(family: str, tmp_path: Path) -> None:
    _assert_equals_peft(save_model(family, tmp_path / "base"), tmp_path, SHARED)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("is_fused", [False, True], ids=["each by itself", "stacks"])
def test_a_merge_of_experts_equals_peft_in_both_layouts(
    is_fused: bool, kind: str, tmp_path: Path
) -> None:
    family = "qwen3_5_moe_text" if is_fused else "qwen3_next"
    base = save_model(family, tmp_path / "base")
    _assert_equals_peft(fuse_experts(base) if is_fused else base, tmp_path, EXPERT_KINDS[kind])


def test_a_merge_of_experts_equals_peft_in_qwen3_moe(tmp_path: Path) -> None:
    _assert_equals_peft(
        save_model("qwen3_moe", tmp_path / "base"), tmp_path, EXPERT_KINDS["everything"]
    )


def test_a_vision_layout_keeps_every_other_bit(tmp_path: Path) -> None:
    plain = fuse_experts(save_model("qwen3_5_moe_text", tmp_path / "plain"))
    base = publish(plain, tmp_path / "base")
    adapter = save_adapter(plain, tmp_path / "adapter", **EXPERT_KINDS["everything"]).folder
    bits = {path.name: path.read_bytes() for path in base.iterdir()}
    written = find_shards(_merge(base, adapter, tmp_path / "merged"))
    before = find_shards(base)

    assert before.file_of == written.file_of
    changed = set(changed_tensors(before, written))
    assert changed == place(read_adapter(adapter), before).keys()
    assert all(name.startswith("model.language_model.") for name in changed)
    assert {"mtp.layers.0.mlp.experts.0.down_proj.weight", "model.visual.pos_embed.weight"} <= (
        before.file_of.keys() - changed
    )
    # Stacks are changed in place: in memory, not in the file of the base.
    assert {path.name: path.read_bytes() for path in base.iterdir()} == bits


def test_copies_of_the_base_beside_a_lora_are_checked(tmp_path: Path) -> None:
    base = save_model("qwen3", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"]).folder
    tensors = load_file(adapter / "adapter_model.safetensors")
    # As PEFT's save_pretrained adds it (get_peft_model_state_dict, save_embedding_layers).
    copy = load_file(base / SINGLE)["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**tensors, key: copy}, adapter / "adapter_model.safetensors")
    read = read_adapter(adapter)
    assert place(read, find_shards(base)).keys() == {"model.embed_tokens.weight"}

    save_file({**tensors, key: copy + 1}, adapter / "adapter_model.safetensors")
    with pytest.raises(EngineError, match=r"model\.embed_tokens\.weight"):
        place(read_adapter(adapter), find_shards(base))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_embeddings_that_are_the_head_are_refused(target: str, tmp_path: Path) -> None:
    base = save_model("qwen3", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=[target]).folder
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))

    with pytest.raises(EngineError, match="embeddings and head at once"):
        place(read_adapter(adapter), find_shards(base))


def _without_an_expert(tensors: dict[str, torch.Tensor], _config: dict[str, Any]) -> str:
    del tensors["base_model.model.model.layers.0.mlp.experts.lora_B.weight"]
    return r"layers\.0\.mlp\.experts\.lora_A"


def _of_another_rank(_tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> str:
    config["rank_pattern"] = {"mlp.experts.down_proj": RANK + 1}
    return r"layers\.0\.mlp\.experts\.lora_A"


def _without_a_level(_tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> str:
    config["target_parameters"] = EXPERT_TARGETS[1:]
    return r"layers\.0\.mlp\.experts\.base_layer\.lora_A"


def _the_wrong_level(tensors: dict[str, torch.Tensor], _config: dict[str, Any]) -> str:
    for key in [key for key in tensors if "experts.base_layer" in key]:
        other = key.replace(".base_layer", "")
        tensors[key], tensors[other] = tensors[other], tensors[key]
    return r"layers\.0\.mlp\.experts\.down_proj, .*layers\.0\.mlp\.experts\.gate_up_proj"


def _of_more_experts(tensors: dict[str, torch.Tensor], _config: dict[str, Any]) -> str:
    a = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    b = a.replace("lora_A", "lora_B")
    tensors[a] = torch.ones((EXPERTS + 1) * RANK, INNER)
    tensors[b] = torch.ones(HIDDEN, (EXPERTS + 1) * RANK)
    return r"layers\.0\.mlp\.experts\.down_proj"


def _of_fewer_experts(tensors: dict[str, torch.Tensor], _config: dict[str, Any]) -> str:
    a = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    b = a.replace("lora_A", "lora_B")
    tensors[a], tensors[b] = tensors[a][:-RANK].clone(), tensors[b][:, :-RANK].clone()
    return r"layers\.0\.mlp\.experts\.down_proj"


def _with_a_magnitude(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> str:
    config["use_dora"] = True
    key = "base_model.model.model.layers.0.mlp.experts.lora_magnitude_vector"
    tensors[key] = torch.ones(HIDDEN)
    return r"layers\.0\.mlp\.experts\.lora_magnitude_vector"


@pytest.mark.parametrize(
    "broken",
    [
        _without_an_expert,
        _of_another_rank,
        _without_a_level,
        _the_wrong_level,
        _of_more_experts,
        _of_fewer_experts,
        _with_a_magnitude,
    ],
)
@pytest.mark.parametrize("is_fused", [False, True], ids=["each by itself", "stacks"])
def test_experts_that_do_not_fit_are_refused_by_name(
    is_fused: bool, broken: Any, tmp_path: Path
) -> None:
    base = save_model("qwen3_next", tmp_path / "base")
    if is_fused:
        fuse_experts(base)
    adapter = save_adapter(base, tmp_path / "adapter", target_parameters=EXPERT_TARGETS).folder
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    named = broken(tensors, config)
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(EngineError, match=named):
        place(read_adapter(adapter), find_shards(base))


class _LargestFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the values of the largest float32 (or wider) tensor that anything computes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor) and one.dtype in (torch.float32, torch.float64):
                self.largest = max(self.largest, one.untyped_storage().nbytes() // one.itemsize)
        return result


@pytest.mark.parametrize("is_fused", [False, True], ids=["each by itself", "stacks"])
def test_no_stack_of_experts_is_ever_held_in_float32(is_fused: bool, tmp_path: Path) -> None:
    base = save_model("qwen3_next", tmp_path / "base", dtype=torch.bfloat16)
    if is_fused:
        fuse_experts(base)
    adapter = save_adapter(base, tmp_path / "adapter", r=1, target_parameters=EXPERT_TARGETS).folder
    with _LargestFloat32() as merging:  # type: ignore[no-untyped-call]
        _merge(base, adapter, tmp_path / "merged")
    before, after = find_shards(base), find_shards(tmp_path / "merged")
    meant = list(meanings(adapter, base))
    with _LargestFloat32() as certifying:  # type: ignore[no-untyped-call]
        list(changes_carried(meant, before, after))

    one_matrix, one_expert = INNER * HIDDEN, 2 * INNER * HIDDEN
    assert one_matrix <= merging.largest <= one_expert < EXPERTS * one_matrix
    assert one_matrix <= certifying.largest <= one_expert


def test_a_stack_is_read_with_the_expert_slowest_in_a_and_fastest_in_b() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, 6), torch.randn(4, 5, 3)  # experts, rank, in; experts, out, rank
    stack = ExpertsLowRank(
        a=a.reshape(12, 6), b=b.permute(1, 2, 0).reshape(5, 12), rank=3, scale=2.0
    )
    assert stack.shape == (4, 5, 6)
    for expert, part in enumerate(stack.parts()):
        torch.testing.assert_close(part.added_to(torch.zeros(5, 6)), 2.0 * b[expert] @ a[expert])
