"""The target tree on the page: every group with its counts, layers folded, nothing unescaped."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.disk import TEMPLATES
from studio.domain.lora_spec import LoraSpec
from studio.domain.preset import load_models
from studio.domain.target_tree import NotTrained, TargetTree, target_tree
from studio.domain.targets import GROUP_TITLES, TargetGroup
from studio.ui.show_targets import ranges, targets
from tests.studio.ui.test_show import EVIL, Page

MODELS = load_models(TEMPLATES / "models")


def tree(name: str, *groups: str, **lora: object) -> TargetTree:
    return target_tree(
        MODELS[name].config, LoraSpec.model_validate({"targets": groups, "rank": 16, **lora})
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_group_stands_there_with_its_counts(name: str) -> None:
    found = tree(name, "attention")
    page = Page(targets(found))

    assert page.open == []
    for branch in found.groups:
        assert GROUP_TITLES[branch.group] in page.text
        is_chosen = branch.group is TargetGroup.ATTENTION
        count = f"{branch.selected_modules:,} of {branch.modules:,}"
        assert count in page.text
        parameters = f"{branch.parameters:,}" + ("" if is_chosen else " if chosen")
        assert parameters in page.text
    assert f"{found.selected_parameters:,}" in page.text


def test_what_is_not_chosen_is_grey_and_what_is_chosen_is_not() -> None:
    rows = targets(tree("Qwen/Qwen3.5-9B", "attention")).split("<tr")[2:]
    grey = {GROUP_TITLES[g]: any(GROUP_TITLES[g] in r and "subdued" in r.split(">")[0] for r in rows)
            for g in TargetGroup}  # fmt: skip

    assert not grey["Attention (q, k, v, o)"]
    assert grey["Gated DeltaNet (in, z, out)"]
    assert grey["Dense MLP (gate, up, down)"]


def test_parts_that_are_never_trained_say_why() -> None:
    page = Page(targets(tree("Qwen/Qwen3.5-9B", "attention")))

    assert "Vision tower" in page.text
    assert "Text only for now" in page.text
    assert "MTP (multi-token prediction)" in page.text
    assert "Vision tower" not in Page(targets(tree("tiny/qwen3.5", "attention"))).text


def test_layers_are_folded_by_their_place() -> None:
    html = targets(tree("Qwen/Qwen3.5-9B", "attention", modules=["layers.0.mlp.up_proj"]))

    assert "<code>self_attn.q_proj</code> in 8 layers (3, 7, 11, 15, 19, 23, 27, 31): " in html
    assert "<code>mlp.up_proj</code> in 1 layer (0): 262,144 at rank 16" in html
    assert "<code>mlp.up_proj</code> in 31 layers (1-31): not chosen" in html
    assert "1 of 96" in html
    # A page of 64 layers stays small.
    assert len(targets(tree("Qwen/Qwen3.5-27B", "attention"))) < 12_000


def test_a_rank_that_is_wasted_is_said() -> None:
    html = targets(tree("tiny/qwen3.5", "attention", "delta_net_gates"))

    assert "its smaller side is 4." in html


def test_what_a_config_could_smuggle_in_is_text() -> None:
    found = tree("tiny/qwen3.5", "attention")
    branch = found.groups[0].model_copy(update={"title": EVIL, "note": EVIL})
    evil = found.model_copy(
        update={"groups": (branch,), "not_trained": (NotTrained(title=EVIL, reason=EVIL),)}
    )
    page = Page(targets(evil))

    assert not {"script", "img"} & page.tags
    assert page.text.count(EVIL) == 4


def test_colours_come_from_the_page_so_that_both_themes_can_be_read() -> None:
    html = targets(tree("Qwen/Qwen3.5-9B", "attention"))

    assert not re.search(r"#[0-9a-f]{3,6}\b|rgb\(", html)


@given(st.sets(st.integers(0, 200)))
def test_ranges_name_every_number_once(numbers: set[int]) -> None:
    named: list[int] = []
    for part in filter(None, ranges(sorted(numbers)).split(", ")):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(numbers)
