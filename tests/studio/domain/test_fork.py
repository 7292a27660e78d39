"""What a Checkpoint can go on with: the number of steps, where it can be told."""

import pytest

from studio.domain.fork import check_same, check_steps
from studio.domain.spec import parse_spec
from studio.errors import InputError


@pytest.mark.parametrize(
    ("before", "after", "total", "goes_on"),
    [
        ({"epochs": 2}, {"epochs": 2}, 20, True),
        ({"epochs": 2}, {"epochs": 1}, 20, False),
        ({"epochs": 2}, {"epochs": 3}, 20, True),
        ({"epochs": 2}, {"epochs": 2, "max_steps": 10}, 20, False),
        ({"epochs": 2}, {"epochs": 2, "max_steps": 11}, 20, True),
        ({"epochs": 9, "max_steps": 10}, {"epochs": 9, "max_steps": 10}, 10, False),
        ({"epochs": 9, "max_steps": 10}, {"epochs": 9}, 10, True),
        ({"epochs": 9}, {"epochs": 1}, None, True),
        ({"epochs": 2}, {"epochs": 1, "num_gpus": 2}, 20, True),
    ],
)
def test_steps_that_are_left_are_told_where_they_can_be(
    before: dict[str, object], after: dict[str, object], total: int | None, goes_on: bool
) -> None:
    old, new = (parse_spec({"train": train}) for train in (before, after))

    if goes_on:
        check_steps(old, new, step=10, total_steps=total)
    else:
        with pytest.raises(InputError, match="Nothing is left to train: step 10"):
            check_steps(old, new, step=10, total_steps=total)


def test_a_full_fine_tuning_has_no_adapter_that_could_differ() -> None:
    before = parse_spec({"method": "full", "lora": {"rank": 8}})
    after = parse_spec({"method": "full", "lora": {"rank": 4}})
    check_same(before, after)
