"""What the Train page says of a form: of a right one, a wrong one, and another model."""

from typing import Any

import gradio as gr
import pytest

from studio.services import runs
from studio.services.studio import Studio
from studio.ui import form
from studio.ui.train_figures import derive

LEAVES = form.leaves()
NAMES = (
    "choices", "card", "total", "trouble", "yaml", "download", "epoch", "tree", "memory", "wrong",
)  # fmt: skip


def shown(studio: Studio, preset: str, **typed: Any) -> dict[str, Any]:
    values = form.to_values(runs.spec_from_preset(studio, preset, {}), LEAVES)
    keys = [leaf.key for leaf in LEAVES]
    for key, value in typed.items():
        values[keys.index(key.replace("__", "."))] = value
    return dict(zip(NAMES, derive(studio, LEAVES, values), strict=True))


def groups(found: dict[str, Any]) -> list[str]:
    choices: gr.CheckboxGroup = found["choices"]
    return [str(value) for _, value in choices.choices]


def is_kept(value: object) -> bool:
    return isinstance(value, dict) and value == gr.skip()


def test_a_right_form_shows_targets_figures_tree_and_memory(studio: Studio) -> None:
    found = shown(studio, "tiny-qwen3-next")
    assert "routed_experts" in groups(found)
    assert "dense_mlp" not in groups(found)
    assert "trainable parameters" in found["total"]
    assert "Gated DeltaNet" in found["tree"]
    assert "Memory" in found["memory"]
    assert found["trouble"] == found["wrong"] == ""


def test_a_wrong_value_is_told_twice_and_the_last_good_figures_stay(studio: Studio) -> None:
    found = shown(studio, "tiny-qwen3.5", lora__rank="0")
    assert "lora.rank" in found["trouble"]
    assert found["wrong"] == found["trouble"]
    assert all(is_kept(found[name]) for name in ("total", "tree", "memory", "yaml"))
    assert "dense_mlp" in groups(found)  # still those of the model that is named


def test_ticks_of_groups_that_another_model_lacks_are_taken_away_and_named(studio: Studio) -> None:
    ticks = ["attention", "dense_mlp"]
    found = shown(studio, "tiny-qwen3-next", lora__targets=ticks)
    assert found["choices"].value == ["attention"]
    assert "has no Dense MLP" in found["trouble"]


@pytest.mark.parametrize("preset", ["qwen3.5-9b-lora-vision", "qwen3.5-9b-full-vision"])
def test_a_preset_that_cannot_be_launched_yet_says_so_beside_its_own_model(
    studio: Studio, preset: str
) -> None:
    found = shown(studio, preset)
    assert "cannot be launched yet" in found["trouble"]
    assert "routed_experts" not in groups(found)


def test_with_all_weights_there_is_nothing_to_tick(studio: Studio) -> None:
    found = shown(studio, "qwen3.5-9b-full")
    assert found["choices"].interactive is False
    assert "All weights" in found["tree"]
    assert "all weights" in found["total"]


def test_the_yaml_of_one_spec_is_one_file(studio: Studio) -> None:
    files = {shown(studio, "tiny-qwen3.5")["download"].value["path"] for _ in range(2)}
    assert len(files) == 1
