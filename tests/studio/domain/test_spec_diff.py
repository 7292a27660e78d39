"""What is different between two specs: every leaf, in words."""

import warnings
from typing import Any

import pytest

from studio.domain.spec import JobSpec, parse_spec
from studio.domain.spec_diff import diff

BASE = JobSpec()


def test_the_same_spec_has_no_differences() -> None:
    assert diff(BASE, parse_spec(BASE.model_dump(mode="json"))) == []


@pytest.mark.parametrize(
    ("changes", "title", "old", "new"),
    [
        ({"optim": {"learning_rate": 1e-5}}, "Learning rate", "0.0002", "1e-05"),
        ({"train": {"max_steps": 9}}, "Most steps", "empty", "9"),
        ({"batch": {"packing": True}}, "Packing", "no", "yes"),
        ({"lora": {"targets": ["router"]}}, "LoRA targets", "attention, delta_net", "router"),
        (
            {"data": {"mixture": [{"dataset": "b", "weight": 0.5}]}},
            "Mixed with",
            "empty",
            "b: 0.5",
        ),
        ({"eval": {"prompts": ["Why?"]}}, "Sample prompts", "empty", "Why?"),
    ],
)
def test_a_change_is_told_by_title_and_values(
    changes: dict[str, Any], title: str, old: str, new: str
) -> None:
    found = diff(BASE, parse_spec(changes))
    assert [(one.title, one.old, one.new) for one in found] == [(title, old, new)]


def test_every_leaf_of_the_spec_can_be_told() -> None:
    values = BASE.model_dump(mode="json")
    leaves = [
        (section, name)
        for section, value in values.items()
        if isinstance(value, dict)
        for name in value
    ]
    leaves.remove(("data", "mixture"))  # no text
    for section, name in leaves:
        other = BASE.model_copy(
            update={section: vars(BASE)[section].model_copy(update={name: "other"})}
        )
        with warnings.catch_warnings():  # pydantic sees a value of another kind
            warnings.simplefilter("ignore", UserWarning)
            assert [one.key for one in diff(BASE, other)] == [f"{section}.{name}"]
