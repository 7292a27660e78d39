"""Target groups: what a choice of LoRA trains adds up, and what does not fit is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.disk import TEMPLATES
from studio.domain.architecture import FAMILIES
from studio.domain.lora_spec import LoraSpec
from studio.domain.preset import load_models
from studio.domain.target_tree import target_tree
from studio.domain.targets import (
    GROUP_TITLES,
    TargetGroup,
    TargetModule,
    count_by_group,
    lora_parameters,
    select,
    selected,
    target_modules,
)
from studio.errors import InputError

MODELS = load_models(TEMPLATES / "models")
TINY = {model.config["model_type"]: model.config for model in MODELS.values() if model.vocab_size}
DENSE: dict[str, Any] = TINY["qwen3_5_text"]
MOE: dict[str, Any] = TINY["qwen3_5_moe_text"]
NEXT: dict[str, Any] = TINY["qwen3_next"]
QWEN3_MOE: dict[str, Any] = TINY["qwen3_moe"]
BARE = {TargetGroup.ROUTED_EXPERTS, TargetGroup.ROUTER}


def choice(**values: Any) -> LoraSpec:
    return LoraSpec.model_validate({"targets": ["attention"], **values})


def refusal(config: dict[str, Any], **values: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        selected(config, choice(**values))
    assert caught.value.hint
    return caught.value


def names(config: dict[str, Any], **values: Any) -> list[str]:
    return [module.name for module in selected(config, choice(**values))]


# ---- what a model has -------------------------------------------------------------------------

# Leaf names of each group, written down independently of the code under test.
LEAF_NAMES = {
    TargetGroup.ATTENTION: {"q_proj", "k_proj", "v_proj", "o_proj"},
    TargetGroup.DELTA_NET: {"in_proj_qkvz", "in_proj_qkv", "in_proj_z", "out_proj"},
    TargetGroup.DELTA_NET_GATES: {"in_proj_ba", "in_proj_b", "in_proj_a"},
    TargetGroup.DENSE_MLP: {"gate_proj", "up_proj", "down_proj"},
    TargetGroup.SHARED_EXPERT: {"gate_proj", "up_proj", "down_proj"},
    TargetGroup.SHARED_EXPERT_GATE: {"shared_expert_gate"},
    TargetGroup.ROUTED_EXPERTS: {"gate_up_proj", "down_proj"},
    TargetGroup.ROUTER: {"gate"},
    TargetGroup.EMBEDDINGS: {"embed_tokens"},
    TargetGroup.HEAD: {"lm_head"},
}
KINDS = {"routed_experts": "experts", "router": "router", "embeddings": "embedding"}


@pytest.mark.parametrize("known", MODELS.values(), ids=MODELS.keys())
def test_each_group_holds_its_own_modules(known: Any) -> None:
    modules = target_modules(known.config)
    for module in modules:
        assert module.name.rsplit(".", 1)[-1] in LEAF_NAMES[module.group]
        assert module.kind == KINDS.get(module.group.value, "linear")
        assert (module.num_experts > 1) == (module.group is TargetGroup.ROUTED_EXPERTS)
        assert (".shared_expert." in module.name) == (module.group is TargetGroup.SHARED_EXPERT)
        assert (".experts." in module.name) == (module.kind == "experts")
    assert len({module.name for module in modules}) == len(modules)


def test_names_of_a_module_are_those_of_the_contract() -> None:
    modules = {module.name: module for module in target_modules(NEXT)}

    gate_up = modules["layers.0.mlp.experts.gate_up_proj"]
    assert (gate_up.in_features, gate_up.out_features, gate_up.num_experts) == (256, 256, 16)
    assert gate_up.full_name == "model.layers.0.mlp.experts.gate_up_proj"
    assert (gate_up.leaf, gate_up.layer) == ("mlp.experts.gate_up_proj", 0)
    head, embeddings = modules["lm_head"], modules["embed_tokens"]
    assert (head.full_name, embeddings.full_name) == ("lm_head", "model.embed_tokens")
    assert (head.layer, head.leaf) == (None, "lm_head")
    assert (head.in_features, head.out_features) == (256, 1536)
    # An embedding is looked up: its input is the vocabulary.
    assert (embeddings.in_features, embeddings.out_features) == (1536, 256)


def test_the_layers_follow_the_pattern_that_the_config_states() -> None:
    turned = {**DENSE, "layer_types": ["full_attention", "linear_attention"] * 2}
    by_layer = {
        module.layer: module.group
        for module in target_modules(turned)
        if module.name.endswith(("o_proj", "out_proj"))
    }

    assert by_layer == {
        0: TargetGroup.ATTENTION,
        1: TargetGroup.DELTA_NET,
        2: TargetGroup.ATTENTION,
        3: TargetGroup.DELTA_NET,
    }


def test_a_stated_interval_and_the_stated_layers_give_the_same_modules() -> None:
    without = {key: value for key, value in DENSE.items() if key != "layer_types"}

    assert target_modules(without) == target_modules(DENSE)
    assert target_modules({**without, "full_attention_interval": 4}) == target_modules(DENSE)


def test_dense_layers_of_a_mixture_have_a_dense_mlp() -> None:
    mixed = {**QWEN3_MOE, "intermediate_size": 320, "mlp_only_layers": [1]}
    dense = select(target_modules(mixed), [TargetGroup.DENSE_MLP])

    assert [module.name for module in dense] == [
        f"layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")
    ]
    assert dense[0].out_features == 320


# ---- what a choice trains ---------------------------------------------------------------------


@given(
    rank=st.integers(1, 1024),
    rows=st.integers(1, 10**5),
    columns=st.integers(1, 10**5),
    dora=st.booleans(),
)
def test_a_linear_layer_trains_rank_times_both_sides(
    rank: int, rows: int, columns: int, dora: bool
) -> None:
    module = TargetModule(
        name="layers.0.mlp.up_proj",
        group=TargetGroup.DENSE_MLP,
        in_features=columns,
        out_features=rows,
    )
    lora = choice(rank=rank, dora=dora)

    assert module.lora_parameters(lora) == rank * columns + rows * rank + dora * rows


@given(
    rank=st.integers(1, 256),
    alpha=st.floats(0.5, 512),
    top_k=st.integers(1, 16),
    divided=st.booleans(),
)
def test_a_divided_rank_keeps_the_strength_of_every_group(
    rank: int, alpha: float, top_k: int, divided: bool
) -> None:
    lora = choice(rank=rank, alpha=alpha, expert_rank="divided" if divided else "same")
    experts = TargetModule(
        name="layers.0.mlp.experts.down_proj",
        group=TargetGroup.ROUTED_EXPERTS,
        in_features=8,
        out_features=16,
        kind="experts",
        num_experts=16,
        top_k=top_k,
    )
    linear = TargetModule(
        name="layers.0.self_attn.o_proj",
        group=TargetGroup.ATTENTION,
        in_features=8,
        out_features=16,
    )
    of_experts = max(1, rank // top_k) if divided else rank

    assert (linear.lora_rank(lora), experts.lora_rank(lora)) == (rank, of_experts)
    assert experts.lora_alpha(lora) / of_experts == pytest.approx(linear.lora_alpha(lora) / rank)
    assert linear.lora_alpha(lora) == alpha
    assert experts.lora_parameters(lora) == 16 * of_experts * 24


@given(
    st.sets(st.sampled_from(TargetGroup), min_size=1),
    st.sampled_from(sorted(TINY)),
    st.sampled_from(["same", "divided"]),
)
def test_selected_groups_add_up_or_a_missing_one_is_named(
    groups: set[TargetGroup], family: str, expert_rank: str
) -> None:
    # The gate of the shared expert has one output, so a larger rank alone on it is refused.
    rank = 1 if groups == {TargetGroup.SHARED_EXPERT_GATE} else 4
    lora = choice(rank=rank, targets=list(groups), expert_rank=expert_rank)
    modules = target_modules(TINY[family])
    missing = groups - {module.group for module in modules}
    if missing:
        with pytest.raises(InputError, match="matches nothing in this model") as caught:
            selected(TINY[family], lora)
        assert all(group.value in caught.value.message for group in missing)
        assert caught.value.field == "lora.targets"
    else:
        chosen = selected(TINY[family], lora)
        counts = count_by_group(modules, lora)
        assert lora_parameters(chosen, lora) == sum(counts[group] for group in groups)
        assert chosen == [module for module in modules if module.group in groups]


def test_a_missing_group_is_answered_with_those_that_the_model_has() -> None:
    found = refusal(MOE, targets=["dense_mlp"])

    assert found.message == "LoRA target dense_mlp matches nothing in this model."
    assert found.hint == (
        "This model has: attention, delta_net, delta_net_gates, shared_expert, "
        "shared_expert_gate, routed_experts, router, embeddings, head."
    )


@pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())
def test_rank_that_nothing_can_use_is_refused_and_the_largest_usable_one_is_not(
    config: dict[str, Any],
) -> None:
    found = refusal(config, rank=257)
    assert found.field == "lora.rank"
    assert "the largest smaller side is 256" in found.message
    assert selected(config, choice(rank=256))
    if "num_experts" in config and config["model_type"] != "qwen3_moe":
        assert (
            "largest smaller side is 1" in refusal(config, targets=["shared_expert_gate"]).message
        )


# ---- names beside the groups ------------------------------------------------------------------

ALL = range(4)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mlp.gate", [f"layers.{n}.mlp.gate" for n in ALL]),
        ("gate", [f"layers.{n}.mlp.gate" for n in ALL]),
        ("mlp.gate.weight", [f"layers.{n}.mlp.gate" for n in ALL]),
        ("lm_head", ["lm_head"]),
        ("model.embed_tokens.weight", ["embed_tokens"]),
        ("layers.2.mlp.experts.down_proj", ["layers.2.mlp.experts.down_proj"]),
        ("model.layers.3.self_attn.v_proj", ["layers.3.self_attn.v_proj"]),
        ("model.language_model.layers.3.self_attn.v_proj", ["layers.3.self_attn.v_proj"]),
        ("base_model.model.model.layers.0.mlp.gate", ["layers.0.mlp.gate"]),
        ("experts.gate_up_proj", [f"layers.{n}.mlp.experts.gate_up_proj" for n in ALL]),
        # The experts' down_proj is another matter than the linear layers of that name.
        ("down_proj", [f"layers.{n}.mlp.shared_expert.down_proj" for n in ALL]),
    ],
)
def test_a_name_finds_every_layer_that_it_ends(name: str, found: list[str]) -> None:
    assert names(NEXT, targets=[], modules=[name], rank=4) == found


def test_names_add_to_the_groups_without_counting_twice() -> None:
    group = names(DENSE)
    both = names(DENSE, modules=["self_attn.q_proj", "layers.0.mlp.up_proj"])

    assert both == ["layers.0.mlp.up_proj", *group]


@pytest.mark.parametrize("name", ["q_pro", "roj", "layers.9.self_attn.q_proj", "experts", ".", "*"])
def test_a_name_that_matches_nothing_is_answered_with_what_there_is(name: str) -> None:
    found = refusal(DENSE, modules=[name, "q_proj"])

    assert found.message == f"No layer of this model is called {name!r}."
    assert found.field == "lora.modules"
    assert found.hint == (
        "This model has: embed_tokens, linear_attn.in_proj_qkv, linear_attn.in_proj_z, "
        "linear_attn.in_proj_b, linear_attn.in_proj_a, linear_attn.out_proj, mlp.gate_proj, "
        "mlp.up_proj, mlp.down_proj, self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, "
        "self_attn.o_proj, lm_head."
    )


def test_names_of_what_is_never_trained_say_why() -> None:
    whole = MODELS["Qwen/Qwen3.5-9B"].config

    tower = refusal(whole, modules=["model.visual.blocks.0.attn.qkv"])
    assert "its vision tower is not trained, text only for now" in tower.message
    mtp = refusal(whole, modules=["mtp.layers.0.self_attn.q_proj"])
    assert "its MTP layer is not loaded for training" in mtp.message


# ---- what does not go together ----------------------------------------------------------------


@pytest.mark.parametrize("target", ["embeddings", "head"])
def test_tied_embeddings_are_refused_in_every_way_of_choosing_them(target: str) -> None:
    tied = {**DENSE, "tie_word_embeddings": True}
    name = {"embeddings": "embed_tokens", "head": "lm_head"}[target]

    assert "are one tensor in this model" in refusal(tied, targets=[target]).message
    assert "are one tensor in this model" in refusal(tied, modules=[name]).message
    assert names(tied) == names(DENSE)
    assert {target} <= {module.group.value for module in target_modules(DENSE)}
    assert not {target} & {module.group.value for module in target_modules(tied)}


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_and_dora_are_refused_exactly_where_peft_knows_neither(family: str) -> None:
    config = TINY[family]
    for group in {module.group for module in target_modules(config)}:
        rank = 1 if group is TargetGroup.SHARED_EXPERT_GATE else 4
        both = {"targets": [group.value], "rank": rank}
        assert names(config, **both)
        if group in BARE:
            found = refusal(config, **both, dropout=0.1)
            assert (found.field, group.value in found.message) == ("lora.dropout", True)
        else:
            assert names(config, **both, dropout=0.1)
        if group in BARE | {TargetGroup.EMBEDDINGS}:
            found = refusal(config, **both, dora=True)
            assert (found.field, group.value in found.message) == ("lora.dora", True)
        else:
            assert names(config, **both, dora=True)


def test_what_a_name_reaches_is_refused_like_its_group() -> None:
    assert refusal(MOE, modules=["mlp.gate"], dropout=0.1).field == "lora.dropout"
    assert refusal(MOE, modules=["experts.down_proj"], dora=True).field == "lora.dora"


# ---- the tree ---------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(TINY)),
    st.sampled_from(["same", "divided"]),
    st.sampled_from([(), ("mlp.gate_proj",), ("lm_head", "layers.0.self_attn.q_proj")]),
)
def test_a_tree_adds_up_at_every_level(
    family: str, expert_rank: str, further: tuple[str, ...]
) -> None:
    config = TINY[family]
    lora = choice(rank=4, expert_rank=expert_rank, modules=list(further))
    try:
        chosen = selected(config, lora)
    except InputError as error:
        with pytest.raises(InputError, match=error.message.split(".")[0][:20]):
            target_tree(config, lora)
        return
    tree = target_tree(config, lora)
    modules = target_modules(config)

    assert tree.selected_parameters == lora_parameters(chosen, lora)
    assert tree.adapter_bytes == 4 * tree.selected_parameters
    assert tree.selected_modules == len(chosen)
    assert tree.weights == sum(module.num_weights for module in modules)
    assert {b.group: b.parameters for b in tree.groups} == count_by_group(modules, lora)
    for branch in tree.groups:
        leaves = [leaf for part in branch.layers for leaf in part.leaves]
        assert len(leaves) == branch.modules
        assert sum(leaf.weights for leaf in leaves) == branch.weights
        assert sum(leaf.parameters for leaf in leaves) == branch.parameters
        trained = [leaf.parameters for leaf in leaves if leaf.is_selected]
        assert (len(trained), sum(trained)) == (branch.selected_modules, branch.selected_parameters)
        assert branch.adapter_bytes == 4 * branch.selected_parameters
        assert len({part.layer for part in branch.layers}) == len(branch.layers)


def test_a_tree_says_what_is_not_trained_and_why() -> None:
    whole = target_tree(MODELS["Qwen/Qwen3.5-9B"].config, choice())
    tied = target_tree({**DENSE, "tie_word_embeddings": True}, choice())

    assert [part.title for part in whole.not_trained] == [
        "MTP (multi-token prediction)",
        "Vision tower",
    ]
    assert "Text only for now" in whole.not_trained[1].reason
    assert [part.title for part in tied.not_trained] == ["Embeddings", "Head (lm_head)"]
    assert target_tree(DENSE, choice()).not_trained == ()


def test_a_rank_that_a_group_cannot_use_is_noted() -> None:
    lora = choice(targets=["attention", "delta_net_gates"], rank=16)
    notes = {branch.group.value: branch.note for branch in target_tree(DENSE, lora).groups}

    assert notes.pop("delta_net_gates") == (
        "Rank 16 is more than linear_attn.in_proj_b can use: its smaller side is 4."
    )
    assert set(notes.values()) == {""}


def test_every_group_has_a_title() -> None:
    assert set(GROUP_TITLES) == set(TargetGroup)
