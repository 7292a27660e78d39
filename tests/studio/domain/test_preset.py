"""Presets and known models: every file under templates is whole and true to its source."""

from pathlib import Path

import pytest

from studio.disk import TEMPLATES
from studio.domain.architecture import read_architecture
from studio.domain.preset import (
    KnownModel,
    Preset,
    find_preset,
    load_models,
    load_presets,
    merge_values,
)
from studio.domain.spec import spec_from_yaml, spec_to_yaml
from studio.domain.targets import TargetGroup, selected
from studio.errors import InputError, NotFoundError

FOLDER = TEMPLATES / "presets"
PRESETS = load_presets(FOLDER)
MODELS = load_models(TEMPLATES / "models")
TINY = {"tiny-qwen3-next", "tiny-qwen3.5", "tiny-qwen3.5-moe"}
NAMES = {
    "qwen3-next-80b-a3b-qlora",
    "qwen3.5-9b-lora",
    "qwen3.5-9b-full",
    "qwen3.5-27b-qlora",
    "qwen3.5-27b-qlora-fsdp",
    "qwen3.5-27b-full",
    "qwen3.5-35b-a3b-qlora",
    "qwen3.5-35b-a3b-qlora-fsdp",
    "qwen3.5-122b-a10b-qlora",
    "qwen3.5-122b-a10b-qlora-fsdp",
    "qwen3-8b-qlora",
    "qwen3-32b-qlora",
    "qwen3-30b-a3b-qlora",
}
# Configurations of the guides that need pictures.
VISION = {
    "qwen3.5-9b-lora-vision",
    "qwen3.5-9b-full-vision",
    "qwen3.5-35b-a3b-lora-vision",
}
FULL = {name for name in NAMES | VISION if "-full" in name}


def test_every_configuration_of_the_guides_has_its_preset() -> None:
    assert set(PRESETS) == NAMES | VISION | TINY


def test_presets_for_pictures_are_listed_and_name_the_one_to_take() -> None:
    waiting = {name for name, preset in PRESETS.items() if preset.not_yet}
    assert waiting == VISION
    for name in VISION:
        preset = PRESETS[name]
        assert "text only for now" in preset.title
        instead = PRESETS[preset.instead]
        assert not instead.not_yet
        assert instead.job_spec().model == preset.job_spec().model
    assert all(not preset.instead for name, preset in PRESETS.items() if name not in VISION)


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
    assert preset.spec["method"]
    if preset.name in FULL:
        assert (preset.spec["method"], "lora" in preset.spec) == ("full", False)
    else:
        assert preset.spec["lora"]["targets"]


with_lora = pytest.mark.parametrize("name", sorted(set(PRESETS) - FULL))


@with_lora
def test_a_preset_targets_groups_that_its_model_has(name: str) -> None:
    spec = PRESETS[name].job_spec()
    found = selected(MODELS[spec.model.id].config, spec.lora)

    assert {module.group for module in found} == set(spec.lora.targets)


@with_lora
def test_a_preset_touches_the_mixer_of_every_layer(name: str) -> None:
    # Lists made for ordinary transformers leave three layers of four without an adapter.
    spec = PRESETS[name].job_spec()
    found = selected(MODELS[spec.model.id].config, spec.lora)
    mixers = {TargetGroup.ATTENTION, TargetGroup.DELTA_NET}
    layers = read_architecture(MODELS[spec.model.id].config).layers

    assert {m.layer for m in found if m.group in mixers} == set(range(len(layers)))


@each_preset
def test_a_preset_fits_the_positions_of_its_model(preset: Preset) -> None:
    spec = preset.job_spec()
    architecture = read_architecture(MODELS[spec.model.id].config)

    assert spec.data.max_length_tokens <= architecture.max_positions


@each_preset
def test_a_mixture_of_experts_is_ready_for_its_routed_experts(preset: Preset) -> None:
    spec = preset.job_spec()
    experts = read_architecture(MODELS[spec.model.id].config).experts
    if experts is None or preset.name in TINY | VISION:
        return
    assert spec.lora.expert_rank == "divided"
    assert spec.lora.dropout == 0


@each_preset
def test_a_preset_needs_the_gpus_that_its_spec_takes(preset: Preset) -> None:
    assert preset.needs.gpus == preset.job_spec().train.num_gpus


@each_preset
def test_a_preset_says_whose_figure_its_memory_is(preset: Preset) -> None:
    if preset.needs.gpu_memory_gib is None:
        assert preset.name in TINY | VISION
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


# Method, rank, alpha, dropout, tokens, micro-batch, accumulation, GPUs, packing: the values of
# Axolotl's examples, read from the files that the presets link. They do not say how many cards
# their sharded examples take; eight hold the 27B with float32 weights.
AXOLOTL = {
    "qwen3-next-80b-a3b-qlora": ("qlora", 16, 8.0, 0.0, 2048, 2, 2, 1, True),
    "qwen3.5-9b-lora": ("lora", 32, 16.0, 0.05, 8192, 1, 4, 1, False),
    "qwen3.5-9b-full": ("full", None, None, None, 4096, 1, 4, 1, False),
    "qwen3.5-27b-qlora": ("qlora", 16, 32.0, 0.0, 2048, 1, 2, 1, True),
    "qwen3.5-27b-qlora-fsdp": ("qlora", 16, 32.0, 0.0, 2048, 1, 2, 2, True),
    "qwen3.5-27b-full": ("full", None, None, None, 2048, 1, 2, 8, True),
    "qwen3.5-35b-a3b-qlora": ("qlora", 16, 32.0, 0.0, 2048, 4, 2, 1, True),
    "qwen3.5-35b-a3b-qlora-fsdp": ("qlora", 16, 32.0, 0.0, 2048, 1, 2, 2, True),
    "qwen3.5-122b-a10b-qlora": ("qlora", 16, 32.0, 0.0, 2048, 1, 2, 1, True),
    "qwen3.5-122b-a10b-qlora-fsdp": ("qlora", 16, 32.0, 0.0, 2048, 1, 2, 2, True),
    "qwen3-8b-qlora": ("qlora", 16, 32.0, 0.0, 2048, 1, 2, 1, True),
    "qwen3-32b-qlora": ("qlora", 16, 32.0, 0.0, 2048, 1, 2, 1, True),
    "qwen3-30b-a3b-qlora": ("qlora", 16, 32.0, 0.0, 2048, 1, 1, 1, True),
    "qwen3.5-9b-lora-vision": ("lora", 32, 16.0, 0.05, 8192, 1, 4, 1, False),
    "qwen3.5-9b-full-vision": ("full", None, None, None, 4096, 1, 4, 1, False),
    "qwen3.5-35b-a3b-lora-vision": ("lora", 16, 32.0, 0.0, 4096, 1, 4, 1, False),
}


@pytest.mark.parametrize("name", sorted(NAMES | VISION))
def test_a_qwen_preset_has_the_hyper_parameters_of_the_example_that_it_links(name: str) -> None:
    spec = PRESETS[name].job_spec()
    lora = spec.lora if name not in FULL else None

    assert AXOLOTL[name] == (
        spec.method,
        lora and lora.rank,
        lora and lora.alpha,
        lora and lora.dropout,
        spec.data.max_length_tokens,
        spec.batch.micro_batch_size,
        spec.batch.gradient_accumulation_steps,
        spec.train.num_gpus,
        spec.batch.packing,
    )
    assert (spec.optim.schedule, spec.optim.warmup_ratio, spec.train.epochs) == ("cosine", 0.1, 1.0)
    # The examples have 2e-4 everywhere, which is LoRA's.
    assert spec.optim.learning_rate == (1e-5 if name in FULL else 2e-4)
    assert spec.train.recompute == "auto"
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
    assert all(order < 20 for name, order in zip(PRESETS, orders, strict=True) if name in TINY)
    assert len(set(orders)) == len(orders)


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
    # tiny/qwen3-next-thinking is for looking at Datasets: trained, it would be tiny/qwen3-next
    # again. The tiny Qwen3 are there for tests. Instruct-2507 has other positions than its twin.
    without = {
        "tiny/qwen3-next-thinking",
        "tiny/qwen3",
        "tiny/qwen3-moe",
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
    }
    assert {preset.job_spec().model.id for preset in PRESETS.values()} == set(MODELS) - without


def test_no_repository_is_known_twice() -> None:
    names = [name for known in MODELS.values() for name in (known.id, *known.variants)]

    assert len(set(names)) == len(names)


def test_no_preset_speaks_of_experts_in_16_bits() -> None:
    for path in FOLDER.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "TODO" not in text
        assert "keeps them in 16 bits" not in text


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
