"""Presets and known models: every file under templates is whole and true to its source."""

from pathlib import Path

import pytest

from studio.disk import TEMPLATES
from studio.domain.preset import (
    KnownModel,
    Preset,
    find_preset,
    load_models,
    load_presets,
    merge_values,
)
from studio.domain.spec import spec_from_yaml, spec_to_yaml
from studio.domain.targets import TargetGroup, select, target_modules
from studio.errors import InputError, NotFoundError

FOLDER = TEMPLATES / "presets"
PRESETS = load_presets(FOLDER)
MODELS = load_models(TEMPLATES / "models")
TINY = {"tiny-qwen3-next", "tiny-qwen3.5", "tiny-qwen3.5-moe"}
NAMES = {
    "qwen3-next-80b-a3b-qlora",
    "qwen3.5-9b-lora",
    "qwen3.5-27b-qlora",
    "qwen3.5-27b-qlora-fsdp",
    "qwen3.5-35b-a3b-qlora",
    "qwen3.5-122b-a10b-qlora",
}


def test_there_are_nine_presets() -> None:
    assert set(PRESETS) == NAMES | TINY


each_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())


@each_preset
def test_a_preset_makes_a_whole_spec_that_names_the_preset(preset: Preset) -> None:
    spec = preset.job_spec()

    assert spec.preset == preset.name
    assert spec_from_yaml(spec_to_yaml(spec)) == spec


@each_preset
def test_a_preset_says_its_model_and_its_targets_rather_than_taking_defaults(
    preset: Preset,
) -> None:
    assert preset.spec["model"]["id"]
    assert preset.spec["lora"]["targets"]
    assert preset.spec["method"]


@each_preset
def test_a_preset_targets_groups_that_its_model_has(preset: Preset) -> None:
    spec = preset.job_spec()
    modules = target_modules(MODELS[spec.model.id].config)

    assert {module.group for module in select(modules, spec.lora.targets)} == set(spec.lora.targets)


@each_preset
def test_a_preset_touches_the_mixer_of_every_layer(preset: Preset) -> None:
    # Lists made for ordinary transformers leave three layers of four without an adapter.
    assert {TargetGroup.ATTENTION, TargetGroup.DELTA_NET} <= set(preset.job_spec().lora.targets)


@each_preset
def test_a_preset_needs_the_gpus_that_its_spec_takes(preset: Preset) -> None:
    assert preset.needs.gpus == preset.job_spec().train.num_gpus


@each_preset
def test_a_preset_says_whose_figure_its_memory_is(preset: Preset) -> None:
    if preset.needs.gpu_memory_gib is None:
        assert not preset.needs.memory_basis
    else:
        assert preset.needs.memory_basis.startswith(("measured by ", "computed in "))


@each_preset
def test_a_preset_speaks_plainly_and_links_its_source(preset: Preset) -> None:
    assert preset.title
    assert preset.summary.count(". ") == 1
    assert preset.summary.endswith(".")
    assert preset.source.startswith("https://")


@each_preset
def test_a_preset_names_no_path_outside_the_repository(preset: Preset) -> None:
    assert "shared/" not in (FOLDER / f"{preset.name}.yaml").read_text(encoding="utf-8")


# rank, alpha, dropout, tokens, micro-batch, accumulation, GPUs, learning rate, warm-up: the values
# of Axolotl's examples, read from the files that the presets link.
AXOLOTL = {
    "qwen3-next-80b-a3b-qlora": (16, 8.0, 0.0, 2048, 2, 2, 1, 2e-4, 0.1),
    "qwen3.5-9b-lora": (32, 16.0, 0.05, 8192, 1, 4, 1, 2e-4, 0.1),
    "qwen3.5-27b-qlora": (16, 32.0, 0.0, 2048, 1, 2, 1, 2e-4, 0.1),
    "qwen3.5-27b-qlora-fsdp": (16, 32.0, 0.0, 2048, 1, 2, 2, 2e-4, 0.1),
    "qwen3.5-35b-a3b-qlora": (16, 32.0, 0.0, 2048, 4, 2, 1, 2e-4, 0.1),
    "qwen3.5-122b-a10b-qlora": (16, 32.0, 0.0, 2048, 1, 2, 1, 2e-4, 0.1),
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_qwen_preset_has_the_hyper_parameters_of_the_example_that_it_links(name: str) -> None:
    spec = PRESETS[name].job_spec()

    assert AXOLOTL[name] == (
        spec.lora.rank,
        spec.lora.alpha,
        spec.lora.dropout,
        spec.data.max_length_tokens,
        spec.batch.micro_batch_size,
        spec.batch.gradient_accumulation_steps,
        spec.train.num_gpus,
        spec.optim.learning_rate,
        spec.optim.warmup_ratio,
    )
    assert (spec.optim.schedule, spec.train.epochs) == ("cosine", 1.0)
    assert spec.train.recompute == "auto"
    assert spec.method == ("lora" if name.endswith("-lora") else "qlora")
    assert PRESETS[name].source.startswith(
        "https://github.com/axolotl-ai-cloud/axolotl/blob/main/examples/qwen3"
    )


def test_no_preset_of_several_cards_takes_an_optimizer_that_cannot_be_sharded() -> None:
    # bitsandbytes does not step DTensors:
    # https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1633
    for preset in PRESETS.values():
        if preset.needs.gpus > 1:
            assert preset.job_spec().optim.optimizer == "adamw"


def test_no_qwen3_next_preset_targets_the_shared_expert_that_peft_mistakes() -> None:
    # https://github.com/huggingface/peft/issues/3711
    spec = PRESETS["qwen3-next-80b-a3b-qlora"].job_spec()

    assert TargetGroup.SHARED_EXPERT not in spec.lora.targets


def test_presets_come_in_the_order_of_the_list() -> None:
    orders = [preset.order for preset in PRESETS.values()]

    assert orders == sorted(orders)
    assert all(order >= 20 for name, order in zip(PRESETS, orders, strict=True) if name in NAMES)


@pytest.mark.parametrize("known", MODELS.values(), ids=MODELS.keys())
def test_a_known_model_links_its_source(known: KnownModel) -> None:
    assert known.source.startswith("https://")
    assert known.is_built_here == (known.chat_template is not None)
    assert known.is_built_here == (known.vocab_size is not None)
    if not known.is_built_here:
        assert known.source == f"https://huggingface.co/{known.id}"
    if known.chat_template is not None:
        assert (TEMPLATES / "chat" / known.chat_template).is_file()


def test_every_known_model_has_a_preset_and_the_other_way_round() -> None:
    # Its template is for looking at Datasets; trained, it would be tiny/qwen3-next again.
    only_read = {"tiny/qwen3-next-thinking"}
    assert {preset.job_spec().model.id for preset in PRESETS.values()} == set(MODELS) - only_read


def test_changes_lie_over_the_preset_section_by_section() -> None:
    preset = PRESETS["qwen3.5-27b-qlora"]
    spec = preset.job_spec({"lora": {"rank": 8}, "name": "mine"})

    assert (spec.lora.rank, spec.lora.alpha, spec.name) == (8, 32.0, "mine")
    assert preset.job_spec().lora.rank == 16


def test_merging_replaces_values_and_keeps_both_inputs() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}

    assert merge_values(base, {"a": {"c": [3]}, "d": {"e": 1}}) == {
        "a": {"b": 1, "c": [3]},
        "d": {"e": 1},
    }
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


def test_an_unknown_preset_is_answered_with_those_that_exist() -> None:
    with pytest.raises(NotFoundError) as caught:
        find_preset({"one": PRESETS["qwen3.5-9b-lora"]}, "two")

    assert caught.value.message == "There is no preset 'two'."
    assert caught.value.hint == "Choose one of: one."
    assert find_preset(PRESETS, "qwen3.5-9b-lora").name == "qwen3.5-9b-lora"


GOOD = "title: t\nsummary: s\nneeds: {gpus: 0}\nsource: https://example.org\nspec: {}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD.replace("https", "http"),
            "bad.yaml: source is 'http://example.org': source is a link that starts with https://.",
        ),
        (GOOD + "colour: red\n", "bad.yaml: colour is not a field of a Preset."),
        ("- a\n", "bad.yaml holds list, not fields with values."),
        ("a: [\n", "bad.yaml is not YAML: "),
    ],
)
def test_a_wrong_preset_file_is_named_with_its_field(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")

    with pytest.raises(InputError) as caught:
        load_presets(tmp_path)

    assert caught.value.message.startswith(message)


def test_a_wrong_value_inside_a_preset_is_named_when_the_spec_is_made(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        GOOD.replace("spec: {}", "spec: {lora: {rank: 0}}"), encoding="utf-8"
    )

    with pytest.raises(InputError, match=r"lora\.rank is 0"):
        load_presets(tmp_path)["bad"].job_spec()


def test_a_wrong_model_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("id: a\ncolour: red\n", encoding="utf-8")

    with pytest.raises(InputError, match=r"bad\.yaml: .*colour is not a field of a KnownModel"):
        load_models(tmp_path)
