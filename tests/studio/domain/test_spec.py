"""JobSpec: every field explains itself, every wrong value is named, YAML loses nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen
from hypothesis import given
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from studio.domain.data_spec import DataSpec, MixturePart
from studio.domain.lora_spec import LoraSpec
from studio.domain.section import Section
from studio.domain.spec import (
    JobSpec,
    ModelRef,
    OptimSpec,
    parse_spec,
    spec_from_yaml,
    spec_to_yaml,
    yaml_mapping,
)
from studio.domain.targets import TargetGroup
from studio.domain.train_spec import BatchSpec, EvalSpec, TrainSpec
from studio.errors import InputError


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


LEAVES = dict(leaves(JobSpec))


@pytest.mark.parametrize("name", LEAVES)
def test_every_field_has_a_title_and_says_what_it_does(name: str) -> None:
    field = LEAVES[name]

    assert field.title
    assert field.description
    assert field.description.endswith(".")
    assert len(field.description.split()) >= 4
    assert not field.is_required()


@pytest.mark.parametrize("name", LEAVES)
def test_every_number_and_every_text_has_bounds(name: str) -> None:
    field = LEAVES[name]
    kinds = {type(bound) for bound in field.metadata}

    if field.annotation in (int, float, int | None):
        assert kinds & {Ge, Gt}
        assert kinds & {Le, Lt}
    elif field.annotation in (str, str | None):
        assert MaxLen in kinds


def test_no_section_has_more_than_ten_fields() -> None:
    sections: list[type[Section]] = [
        ModelRef,
        DataSpec,
        LoraSpec,
        BatchSpec,
        OptimSpec,
        TrainSpec,
        EvalSpec,
        JobSpec,
    ]

    # The format's version is no field that anyone fills in.
    assert all(len(section.model_fields.keys() - {"version"}) <= 10 for section in sections)


def nested(name: str, value: object) -> dict[str, Any]:
    values: Any = value
    for part in reversed(name.split(".")):
        values = {part: values}
    result: dict[str, Any] = values
    return result


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("optim.learning_rate", float("nan"), "nan: input should be a finite number"),
        ("optim.learning_rate", float("inf"), "inf: input should be a finite number"),
        (
            "optim.learning_rate",
            "1,5e-4",
            "'1,5e-4': input should be a valid number, unable to parse string as a number",
        ),
        ("optim.learning_rate", -1, "-1: input should be greater than 0"),
        ("optim.learning_rate", 0, "0: input should be greater than 0"),
        ("optim.warmup_ratio", 0.6, "0.6: input should be less than or equal to 0.5"),
        (
            "optim.optimizer",
            "sgd",
            "'sgd': input should be 'adamw', 'adamw_8bit', 'paged_adamw_8bit' or 'ademamix_8bit'",
        ),
        ("lora.rank", 0, "0: input should be greater than or equal to 1"),
        (
            "lora.rank",
            8.5,
            "8.5: input should be a valid integer, got a number with a fractional part",
        ),
        ("lora.dropout", 1, "1: input should be less than 1"),
        ("train.epochs", None, "None: input should be a valid number"),
        ("train.max_steps", 0, "0: input should be greater than or equal to 1"),
        ("train.seed", 2**32, "4294967296: input should be less than or equal to 4294967295"),
        ("model.id", "", "'': string should have at least 1 character"),
        ("model", 5, "5: input should be a valid dictionary or instance of ModelRef"),
        ("version", 2, "2: input should be 1"),
        ("method", "fft", "'fft': input should be 'qlora', 'lora', 'auto' or 'full'"),
    ],
)
def test_a_wrong_value_names_field_value_and_expectation(
    name: str, value: object, sentence: str
) -> None:
    with pytest.raises(InputError) as caught:
        parse_spec(nested(name, value))

    assert caught.value.message == f"{name} is {sentence}."
    assert caught.value.field == name
    assert caught.value.hint


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(InputError) as caught:
        parse_spec({"optim": {"learning_rte": 1e-4}})

    assert caught.value.message == "optim.learning_rte is not a field of a JobSpec."


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        parse_spec({"lora": {"rank": 0}, "train": {"epochs": 0}, "color": "red"})

    assert caught.value.message == (
        "lora.rank is 0: input should be greater than or equal to 1; "
        "train.epochs is 0: input should be greater than 0; "
        "color is not a field of a JobSpec."
    )


def test_a_wrong_target_names_the_groups_that_exist() -> None:
    with pytest.raises(InputError) as caught:
        parse_spec({"lora": {"targets": ["attention", "q_proj"]}})

    assert caught.value.field == "lora.targets.1"
    for group in TargetGroup:
        assert repr(group.value) in caught.value.message


@given(st.lists(st.sampled_from(TargetGroup), min_size=1))
def test_targets_are_a_set_in_the_order_of_the_form(groups: list[TargetGroup]) -> None:
    targets = LoraSpec(targets=tuple(groups)).targets

    assert set(targets) == set(groups)
    assert list(targets) == [group for group in TargetGroup if group in groups]


def test_a_name_is_one_printable_line() -> None:
    assert JobSpec(name="  my\n first\x1b[31m  run\u202e ").name == "my first[31m run"


def test_an_empty_revision_means_the_newest() -> None:
    assert ModelRef(revision="").revision is None


def test_an_adapter_of_nothing_is_refused_and_layers_by_name_are_enough() -> None:
    with pytest.raises(InputError, match="choose a group of targets, or name a layer here"):
        parse_spec({"lora": {"targets": []}})

    spec = parse_spec({"lora": {"targets": [], "modules": "self_attn.v_proj, mlp.gate "}})
    assert spec.lora.modules == ("self_attn.v_proj", "mlp.gate")


@pytest.mark.parametrize(("before", "now"), [(True, "all"), (False, "none")])
def test_specs_from_before_recompute_had_three_values_are_read(before: bool, now: str) -> None:
    assert parse_spec({"train": {"gradient_checkpointing": before}}).train.recompute == now


def numbers(name: str) -> st.SearchStrategy[float]:
    """Draw from the whole allowed range of a field."""
    bounds = {type(bound): bound for bound in LEAVES[name].metadata}
    low = bounds[Ge].ge if Ge in bounds else bounds[Gt].gt
    high = bounds[Le].le if Le in bounds else bounds[Lt].lt
    if LEAVES[name].annotation is float:
        return st.floats(low, high, exclude_min=Gt in bounds, exclude_max=Lt in bounds)
    return st.integers(low, high)


SPECS = st.builds(
    JobSpec,
    name=st.text(max_size=60),
    preset=st.text(max_size=60),
    method=st.sampled_from(["qlora", "lora"]),
    model=st.builds(
        ModelRef, id=st.text(min_size=1, max_size=60), revision=st.none() | st.text(max_size=60)
    ),
    data=st.builds(
        DataSpec,
        dataset=st.text(max_size=60)
        | st.sampled_from(["=", "~", "1_0", "0x1", "1e3", "no", "1:2"]),
        weight=numbers("data.weight"),
        mixture=st.lists(
            st.builds(
                MixturePart,
                dataset=st.text(min_size=1, max_size=20).filter(lambda name: "," not in name),
                weight=st.floats(1e-6, 100),
            ),
            max_size=3,
        ).map(tuple),
        eval_dataset=st.text(max_size=20),
        eval_share=numbers("data.eval_share"),
        max_length_tokens=numbers("data.max_length_tokens"),
        truncation=st.sampled_from(["refuse", "cut", "split"]),
        thinking=st.sampled_from(["train", "mask", "strip"]),
        empty_think=st.sampled_from(["prompt", "train"]),
    ),
    lora=st.builds(
        LoraSpec,
        rank=numbers("lora.rank"),
        alpha=numbers("lora.alpha"),
        dropout=numbers("lora.dropout"),
        targets=st.lists(st.sampled_from(TargetGroup), min_size=1).map(tuple),
    ),
    batch=st.builds(
        BatchSpec,
        micro_batch_size=numbers("batch.micro_batch_size"),
        gradient_accumulation_steps=numbers("batch.gradient_accumulation_steps"),
    ),
    optim=st.builds(
        OptimSpec,
        optimizer=st.sampled_from(["adamw", "adamw_8bit", "paged_adamw_8bit", "ademamix_8bit"]),
        learning_rate=numbers("optim.learning_rate"),
        schedule=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
        decay_ratio=numbers("optim.decay_ratio"),
        loraplus_ratio=numbers("optim.loraplus_ratio"),
        neftune_alpha=numbers("optim.neftune_alpha"),
        warmup_ratio=numbers("optim.warmup_ratio"),
        weight_decay=numbers("optim.weight_decay"),
        max_grad_norm=numbers("optim.max_grad_norm"),
    ),
    train=st.builds(
        TrainSpec,
        epochs=numbers("train.epochs"),
        max_steps=st.none() | numbers("train.max_steps"),
        seed=numbers("train.seed"),
        recompute=st.sampled_from(["auto", "all", "none"]),
        num_gpus=numbers("train.num_gpus"),
        num_nodes=numbers("train.num_nodes"),
        save_steps=st.none() | numbers("train.save_steps"),
        keep_checkpoints=numbers("train.keep_checkpoints"),
        accept_slow_kernels=st.booleans(),
    ),
    eval=st.builds(
        EvalSpec,
        every_steps=st.none() | numbers("eval.every_steps"),
        patience=st.none() | numbers("eval.patience"),
        prompts=st.lists(st.text(), max_size=8).map(tuple),
        prompt_tokens=numbers("eval.prompt_tokens"),
    ),
)


@given(SPECS)
def test_yaml_and_json_keep_every_spec_exactly(spec: JobSpec) -> None:
    assert spec_from_yaml(spec_to_yaml(spec)) == spec
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_yaml_shows_the_sections_in_the_order_of_the_form() -> None:
    text = spec_to_yaml(JobSpec())

    assert list(yaml_mapping(text, "It")) == list(JobSpec.model_fields)
    assert "learning_rate: 0.0002" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The spec holds NoneType, not fields with values."),
        ("just text", "The spec holds str, not fields with values."),
        ("- a", "The spec holds list, not fields with values."),
        (
            "name: 2024-13-45",
            "The spec is not YAML: month must be in 1..12.",
        ),
    ],
)
def test_text_that_is_no_mapping_is_an_input_error(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        spec_from_yaml(text)

    assert caught.value.message == message


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\t", "a: !!python/name:os.system", "[" * 500])
def test_broken_yaml_is_an_input_error_on_one_line(text: str) -> None:
    with pytest.raises(InputError, match="The spec is not YAML") as caught:
        spec_from_yaml(text)

    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_a_huge_wrong_value_is_not_quoted_in_full() -> None:
    for value in ("x" * 100_000, [["x"] * 1000] * 1000, {"x": "x" * 100_000}):
        with pytest.raises(InputError) as caught:
            parse_spec({"name": value})
        assert len(caught.value.message) < 500


@pytest.mark.parametrize("text", ["a: &a x\nname: *a", "lora: &a {targets: [*a]}"])
def test_yaml_aliases_are_refused_because_they_can_unfold_to_gigabytes(text: str) -> None:
    with pytest.raises(InputError) as caught:
        spec_from_yaml(text)

    assert caught.value.message == "The spec uses YAML aliases (*name)."
