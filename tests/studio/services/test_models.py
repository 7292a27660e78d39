"""Base models: what is told of them without their weights, and what is refused in a sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from studio.domain.lora_spec import LoraSpec
from studio.domain.spec import JobSpec, parse_spec
from studio.domain.targets import TargetGroup
from studio.errors import InputError
from studio.services import models
from studio.services.studio import Studio


def spec(**changes: Any) -> JobSpec:
    return parse_spec({"model": {"id": "tiny/qwen3.5-moe"}, **changes})


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a config.json into a hub cache of this test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def put(model_id: str, text: str) -> None:
        folder = tmp_path / f"models--{model_id.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("a" * 40)
        (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
        (folder / "snapshots" / ("a" * 40) / "config.json").write_text(text)

    return put


def test_a_variant_has_the_configuration_of_the_model_that_names_it(studio: Studio) -> None:
    for known in studio.models.values():
        for name in (known.id, *known.variants):
            assert models.config_of(studio, name) == known.config
    assert any(known.variants for known in studio.models.values())


def test_a_hub_model_is_known_once_its_config_was_downloaded(
    studio: Studio, hub_cache: Callable[[str, str], None]
) -> None:
    assert models.config_of(studio, "someone/their-model") is None
    assert models.tree_of(studio, "someone/their-model", LoraSpec()) is None
    models.check_targets(studio, spec(model={"id": "someone/their-model"}))
    hub_cache("someone/their-model", json.dumps(studio.models["tiny/qwen3"].config))

    found = models.architecture_of(studio, "someone/their-model")
    assert found is not None
    assert found.family == "qwen3"
    assert models.config_of(studio, "someone/their-model", "other-branch") is None
    with pytest.raises(InputError, match="delta_net matches nothing"):
        models.check_targets(studio, spec(model={"id": "someone/their-model"}))


def test_a_name_that_no_hub_could_have_is_refused(studio: Studio) -> None:
    with pytest.raises(InputError, match="'a/b/c' is no name of a hub model"):
        models.config_of(studio, "a/b/c")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is no model folder"),
        (b"{", "is not JSON: Expecting property name"),
        (b"\xff\xfe{}", "is not JSON."),
        (b"[" * 100_000, "is not JSON."),
        (b"[1]", "holds no fields with values"),
        (b'{"a": "' + b"x" * models.MAX_CONFIG_BYTES + b'"}', "is larger than any model's"),
    ],
    ids=["missing", "cut", "no text", "deep", "list", "large"],
)
def test_a_folder_without_a_readable_config_is_refused(
    studio: Studio, tmp_path: Path, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        models.config_of(studio, str(tmp_path))
    assert words in caught.value.message
    assert caught.value.field == "model.id"


def test_a_folder_is_read_and_its_targets_are_counted(studio: Studio, tmp_path: Path) -> None:
    config = studio.models["tiny/qwen3.5-moe"].config
    (tmp_path / "config.json").write_text(json.dumps(config))
    lora = LoraSpec(rank=4, targets=(TargetGroup.ROUTED_EXPERTS,), expert_rank="divided")
    tree = models.tree_of(studio, str(tmp_path), lora)

    assert tree == models.tree_of(studio, "tiny/qwen3.5-moe", lora)
    assert tree is not None
    # 4 layers of 16 experts at rank 2: (256 + 2 x 128) and (128 + 256).
    assert tree.selected_parameters == 4 * 16 * 2 * (512 + 384)
    counts = models.parameters_by_group(studio, spec(lora=lora.model_dump()))
    assert counts is not None
    assert counts[TargetGroup.ROUTED_EXPERTS] == tree.selected_parameters


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"lora": {"targets": ["dense_mlp"]}}, "lora.targets", "matches nothing in this model"),
        ({"lora": {"modules": ["nope"]}}, "lora.modules", "No layer of this model is called"),
        ({"lora": {"targets": ["router"], "dropout": 0.1}}, "lora.dropout", "Dropout 0.1"),
        ({"lora": {"rank": 1000}}, "lora.rank", "Rank 1000 is more than"),
        ({"data": {"max_length_tokens": 4097}}, "data.max_length_tokens", "longer than the 4,096"),
        ({"preset": "qwen3.5-9b-lora-vision"}, "preset", "yet: text only for now"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_beside_its_field(
    studio: Studio, changes: dict[str, Any], field: str, words: str
) -> None:
    models.check_targets(studio, spec())
    with pytest.raises(InputError) as caught:
        models.check_targets(studio, spec(**changes))
    assert caught.value.field == field
    assert words in caught.value.message


def test_full_training_asks_for_no_targets(studio: Studio) -> None:
    lora = {"targets": ["dense_mlp"], "rank": 1000}

    models.check_targets(studio, spec(method="full", lora=lora))
    with pytest.raises(InputError, match="longer than"):
        models.check_targets(studio, spec(method="full", data={"max_length_tokens": 5000}))


def test_every_preset_that_can_be_launched_passes(studio: Studio) -> None:
    for preset in studio.presets.values():
        if not preset.not_yet:
            models.check_targets(studio, preset.job_spec())


def test_early_stopping_without_anything_to_evaluate_is_refused(studio: Studio) -> None:
    changes = {"model": {"id": "tiny/qwen3.5"}, "eval": {"patience": 2}}
    with pytest.raises(InputError, match="Early stopping after 2 evaluations needs") as caught:
        models.check_targets(studio, parse_spec(changes))
    assert caught.value.field == "eval.patience"
    models.check_targets(studio, parse_spec(changes | {"data": {"eval_share": 0.1}}))


def test_a_run_over_several_machines_is_refused_before_it_waits(studio: Studio) -> None:
    spec = JobSpec.model_validate({"data": {"dataset": "d"}, "train": {"num_nodes": 2}})
    with pytest.raises(InputError, match="A run over 2 machines cannot be launched") as refused:
        models.check_targets(studio, spec)
    assert refused.value.field == "train.num_nodes"
