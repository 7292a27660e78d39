"""The Train form: every leaf of the spec has its place, and nothing is lost on the way."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import gradio as gr
import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.domain.data_spec import MixturePart
from studio.domain.preset import merge_values
from studio.domain.section import Section
from studio.domain.spec import JobSpec, parse_spec
from studio.domain.targets import TargetGroup
from studio.errors import InputError
from studio.ui import form

LEAVES = form.leaves()
BY_KEY = {leaf.key: leaf for leaf in LEAVES}


def keys(section: Section, above: str = "") -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from keys(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def values_with(key: str, value: object) -> list[Any]:
    shown = form.to_values(JobSpec(), LEAVES)
    shown[LEAVES.index(BY_KEY[key])] = value
    return shown


def value_of(spec: JobSpec, key: str) -> Any:
    value: Any = spec
    for part in key.split("."):
        value = getattr(value, part)
    return value


def drawn(leaf: form.Leaf) -> st.SearchStrategy[Any]:
    """Draw from all values that a leaf allows and a person can type."""
    bounds = {type(bound): bound for bound in leaf.field.metadata}
    if get_origin(leaf.kind) is Literal:
        found: st.SearchStrategy[Any] = st.sampled_from(get_args(leaf.kind))
    elif leaf.kind is bool:
        found = st.booleans()
    elif form.is_groups(leaf):
        found = st.lists(st.sampled_from(TargetGroup), min_size=1, unique=True)
    elif leaf.path == form.MIXTURE:
        names = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=","))
        part = st.fixed_dictionaries(
            {"dataset": names.filter(bool), "weight": st.floats(1e-6, 100)}
        )
        found = st.lists(part, max_size=3)
    elif leaf.path in form.BETWEEN:
        word = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=","))
        found = st.lists(word.filter(bool), max_size=3)
    elif leaf.kind is str:
        # What stands around a typed text is taken away.
        typed = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=30)
        found = typed.map(lambda text: text or "a")
    else:
        low = bounds[Ge].ge if Ge in bounds else bounds[Gt].gt
        high = bounds[Le].le if Le in bounds else bounds[Lt].lt
        found = (
            st.floats(low, high, exclude_min=Gt in bounds, exclude_max=Lt in bounds)
            if leaf.kind is float
            else st.integers(low, high)
        )
    return st.none() | found if leaf.is_optional else found


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    nested: dict[str, Any] = {}
    for leaf in LEAVES:
        part: Any = draw(drawn(leaf))
        for name in reversed(leaf.path):
            part = {name: part}
        nested = merge_values(nested, part)
    return parse_spec(nested)


def test_the_form_has_every_leaf_of_the_spec_once_in_its_order() -> None:
    hidden = {".".join(path) for path in form.HIDDEN}
    assert [leaf.key for leaf in LEAVES] == [key for key in keys(JobSpec()) if key not in hidden]


def test_what_is_hidden_is_a_leaf_of_the_spec() -> None:
    assert {".".join(path) for path in form.HIDDEN} <= set(keys(JobSpec()))


def test_no_targets_and_no_layers_is_answered_beside_the_layers() -> None:
    with pytest.raises(InputError, match="choose a group of targets, or name a layer") as caught:
        form.to_spec(values_with("lora.targets", []), LEAVES)
    assert caught.value.field == "lora.modules"


@settings(deadline=None, max_examples=100)
@given(specs())
def test_any_valid_spec_comes_back_from_the_form_unchanged(spec: JobSpec) -> None:
    assert form.to_spec(form.to_values(spec, LEAVES), LEAVES) == spec


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.key)
def test_every_leaf_has_a_component_with_title_explanation_and_address(leaf: form.Leaf) -> None:
    component = form.component(leaf)
    assert component.label == leaf.title
    assert component.info == leaf.field.description
    assert component.elem_id == f"field-{leaf.key.replace('.', '-')}"


def test_the_kind_of_a_component_follows_the_kind_of_the_leaf() -> None:
    kinds = {key: type(form.component(leaf)) for key, leaf in BY_KEY.items()}
    assert kinds["method"] is gr.Dropdown
    assert kinds["train.accept_slow_kernels"] is gr.Checkbox
    assert kinds["lora.targets"] is gr.CheckboxGroup
    assert kinds["optim.learning_rate"] is kinds["train.max_steps"] is gr.Textbox


@pytest.mark.parametrize(
    ("key", "typed", "read"),
    [
        ("optim.learning_rate", "2e-4", 2e-4),
        ("optim.learning_rate", " 0.0002 ", 2e-4),
        ("lora.rank", "8", 8),
        ("train.max_steps", "", None),
        ("train.max_steps", "  ", None),
        ("train.max_steps", None, None),
        ("train.max_steps", "7", 7),
        ("model.revision", "", None),
        ("model.id", "  Qwen/Qwen3.5-9B\n", "Qwen/Qwen3.5-9B"),
        ("data.mixture", "", ()),
        ("data.mixture", None, ()),
        ("data.mixture", "faq", (MixturePart(dataset="faq"),)),
        (
            "data.mixture",
            " faq: 0.5 , notes: of mine: 2,",
            (
                MixturePart(dataset="faq", weight=0.5),
                MixturePart(dataset="notes: of mine", weight=2),
            ),
        ),
    ],
)
def test_what_a_person_types_is_understood(key: str, typed: object, read: object) -> None:
    assert value_of(form.to_spec(values_with(key, typed), LEAVES), key) == read


@pytest.mark.parametrize(
    ("key", "typed", "words"),
    [
        ("lora.rank", "0", "lora.rank is '0': input should be greater than or equal to 1"),
        ("lora.rank", "many", "lora.rank is 'many': input should be a valid integer"),
        ("lora.rank", "2.5", "lora.rank is '2.5': input should be a valid integer"),
        ("lora.rank", "", "lora.rank is '': input should be a valid integer"),
        ("lora.rank", None, "lora.rank is None: input should be a valid integer"),
        ("optim.learning_rate", "1,5e-4", "optim.learning_rate is '1,5e-4': input should be a"),
        ("optim.learning_rate", "nan", "optim.learning_rate is 'nan': input should be a finite"),
        ("optim.learning_rate", "inf", "optim.learning_rate is 'inf': input should be a finite"),
        ("optim.learning_rate", "", "optim.learning_rate is '': input should be a valid number"),
        ("train.max_steps", "soon", "train.max_steps is 'soon': input should be a valid integer"),
        ("data.mixture", "faq: much", "data.mixture.0.weight is 'much': input should be a valid"),
        ("data.mixture", "faq: 0", "data.mixture.0.weight is '0': input should be greater than 0"),
        ("data.mixture", ": 2", "data.mixture.0.dataset is '': "),
        ("model.id", "  ", "model.id is '': "),
    ],
)
def test_a_wrong_value_is_answered_with_its_field_and_itself(
    key: str, typed: object, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        form.to_spec(values_with(key, typed), LEAVES)
    assert caught.value.field.startswith(key)
    assert caught.value.message.startswith(words)
    assert caught.value.hint


def test_all_wrong_fields_are_named_at_once() -> None:
    values = values_with("lora.rank", "x")
    values[LEAVES.index(BY_KEY["train.epochs"])] = "y"
    with pytest.raises(InputError, match=r"lora\.rank is 'x'.*train\.epochs is 'y'"):
        form.to_spec(values, LEAVES)
