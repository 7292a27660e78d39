"""`studio model ...`: the same tree as the page shows, and refusals with the field at fault."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from studio import terminal
from studio.disk import TEMPLATES
from studio.domain.lora_spec import LoraSpec
from studio.domain.preset import load_models
from studio.domain.target_tree import target_tree
from studio.errors import InputError, NotFoundError, StudioError
from studio.model_commands import model_app

MODELS = load_models(TEMPLATES / "models")


class Words:
    """Runs `studio model` in this process and returns what it prints."""

    def __init__(self, home: Path, printed: io.StringIO) -> None:
        self._home = home
        self._printed = printed

    def __call__(self, *arguments: str) -> str:
        """Return what one command prints."""
        self._printed.seek(0)
        self._printed.truncate()
        model_app([*arguments, "--home", str(self._home)], standalone_mode=False)
        return self._printed.getvalue()

    def values(self, *arguments: str) -> Any:
        """Return what it prints with --json."""
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    printed = io.StringIO()
    # Not `file`: undone, that would hold on to the standard output of this moment.
    monkeypatch.setattr(terminal.out, "_file", printed)
    return Words(tmp_path, printed)


def test_every_known_model_is_listed_with_its_presets(words: Words) -> None:
    found = {row["id"]: row for row in words.values("list")}

    assert set(found) == set(MODELS)
    assert found["Qwen/Qwen3.5-9B"]["presets"] == ["qwen3.5-9b-lora", "qwen3.5-9b-full"]
    assert found["Qwen/Qwen3.5-9B"]["has_vision"]
    assert found["Qwen/Qwen3-30B-A3B"]["experts"] == 128
    table = words("list")
    assert all(name in table for name in MODELS)


def test_targets_are_those_of_the_tree(words: Words) -> None:
    found = words.values(
        "targets", "Qwen/Qwen3-Next-80B-A3B-Thinking", "--targets", "attention, routed_experts",
        "--modules", "mlp.gate", "--rank", "20", "--expert-rank", "divided",
    )  # fmt: skip
    lora = LoraSpec.model_validate(
        {
            "targets": ["attention", "routed_experts"],
            "modules": ["mlp.gate"],
            "rank": 20,
            "expert_rank": "divided",
        }
    )
    tree = target_tree(MODELS["Qwen/Qwen3-Next-80B-A3B-Instruct"].config, lora)

    assert found["selected_parameters"] == tree.selected_parameters
    assert found["adapter_bytes"] == 4 * tree.selected_parameters
    assert [group["group"] for group in found["groups"]] == [b.group.value for b in tree.groups]
    by_name = {group["group"]: group for group in found["groups"]}
    assert by_name["routed_experts"]["layers"][0]["leaves"][0]["rank"] == 2
    assert by_name["router"]["selected_modules"] == 48


def test_without_a_choice_the_usual_groups_that_the_model_has_are_taken(words: Words) -> None:
    for name, usual in (
        ("tiny/qwen3.5", {"attention", "delta_net"}),
        ("tiny/qwen3", {"attention"}),
    ):
        groups = words.values("targets", name)["groups"]
        assert {group["group"] for group in groups if group["selected_modules"]} == usual


def test_names_alone_take_no_group_beside_them(words: Words) -> None:
    found = words.values("targets", "tiny/qwen3", "--modules", "layers.0.self_attn.q_proj")

    assert found["selected_modules"] == 1


def test_the_table_says_what_is_trained_and_what_is_not(words: Words) -> None:
    found = words(
        "targets", "Qwen/Qwen3.5-9B", "--targets", "attention,delta_net_gates", "--rank", "64"
    )

    assert "Qwen/Qwen3.5-9B: Qwen3.5 (dense), 32 layers" in found
    assert "32 of 32" in found
    total = next(line for line in found.splitlines() if line.startswith("all"))
    assert total.count(",") == 2
    assert "15,728,640" in found  # four times the 3,932,160 of rank 16
    assert "delta_net_gates: Rank 64 is more than linear_attn.in_proj_b can use" in found
    assert "Vision tower, not trained: Text only for now" in found


@pytest.mark.parametrize(
    ("arguments", "error", "field"),
    [
        (["tiny/llama"], InputError, "model.id"),
        (["someone/never-seen"], NotFoundError, "model.id"),
        (["someone/never-seen@branch"], NotFoundError, "model.id"),
        (["/nowhere@all"], InputError, "model.id"),
        (["tiny/qwen3", "--targets", "delta_net"], InputError, "lora.targets"),
        (["tiny/qwen3", "--targets", "everything"], InputError, "lora.targets.0"),
        (["tiny/qwen3", "--rank", "0"], InputError, "lora.rank"),
        (["tiny/qwen3", "--rank", "257"], InputError, "lora.rank"),
        (["tiny/qwen3", "--expert-rank", "half"], InputError, "lora.expert_rank"),
        (["tiny/qwen3", "--modules", "nope"], InputError, "lora.modules"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(
    words: Words, arguments: list[str], error: type[StudioError], field: str
) -> None:
    with pytest.raises(error) as caught:
        words("targets", *arguments)
    assert caught.value.field == field
    assert caught.value.hint
