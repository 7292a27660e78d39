"""What a training reads: which Datasets go together, and which are refused in words."""

import json
from pathlib import Path

import pytest

from studio.domain.spec import JobSpec, parse_spec
from studio.errors import InputError, NotFoundError
from studio.services import datasets, mixtures
from studio.services.studio import Studio
from studio.store.rows import DatasetRow


def talk(question: str, answer: str = "Yes.") -> dict[str, object]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def stored(studio: Studio, folder: Path, name: str, *records: object) -> DatasetRow:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    row = datasets.import_file(studio, path).row
    assert row is not None
    return row


def spec(**data: object) -> JobSpec:
    return parse_spec({"data": data})


def test_names_become_content_hashes(studio: Studio, tmp_path: Path) -> None:
    rows = [stored(studio, tmp_path, name, talk(f"{name}?")) for name in "abc"]
    wanted = spec(dataset="a", weight=2.0, mixture=f"{rows[1].id}: 0.5", eval_dataset="c")
    found = mixtures.for_training(studio, wanted)
    assert [(part.row.name, part.weight) for part in found.parts] == [("a", 2.0), ("b", 0.5)]
    pinned = found.pinned(wanted)
    assert pinned.data.dataset == rows[0].sha256
    assert [(part.dataset, part.weight) for part in pinned.data.mixture] == [(rows[1].sha256, 0.5)]
    assert pinned.data.eval_dataset == rows[2].sha256
    assert mixtures.for_training(studio, pinned).pinned(pinned) == pinned


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        ({"dataset": "x"}, "data.dataset", "There is no dataset 'x'"),
        ({"dataset": "a", "mixture": "x"}, "data.mixture", "There is no dataset 'x'"),
        ({"dataset": "a", "eval_dataset": "x"}, "data.eval_dataset", "There is no dataset 'x'"),
    ],
)
def test_a_dataset_that_is_not_there_is_named_with_its_field(
    studio: Studio, tmp_path: Path, data: dict[str, object], field: str, message: str
) -> None:
    stored(studio, tmp_path, "a", talk("a?"))
    with pytest.raises(NotFoundError, match=message) as caught:
        mixtures.for_training(studio, spec(**data))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        ({"mixture": "1"}, "data.mixture", "'a' stands 2 times in the mixture"),
        ({"mixture": "b, b: 3"}, "data.mixture", "'b' stands 2 times in the mixture"),
        ({"eval_dataset": "1"}, "data.eval_dataset", "'a' is trained on and evaluated"),
        (
            {"mixture": "b", "eval_dataset": "b"},
            "data.eval_dataset",
            "'b' is trained on and evaluated",
        ),
        (
            {"eval_dataset": "b", "eval_share": 0.1},
            "data.eval_share",
            "An evaluation dataset is chosen, and an evaluation share of 0.1 too",
        ),
        ({"eval_share": 0.1}, "data.eval_share", "No part of 'a' can be kept for evaluation"),
        ({"mixture": "pairs"}, "data.mixture", "this preset needs messages"),
        (
            {"eval_dataset": "pictures"},
            "data.eval_dataset",
            r"'pictures' holds images in 2 conversations \(first: 2\); this preset reads text only",
        ),
    ],
)
def test_what_cannot_be_trained_on_together_is_refused(
    studio: Studio, tmp_path: Path, data: dict[str, object], field: str, message: str
) -> None:
    stored(studio, tmp_path, "a", talk("a?"))
    stored(studio, tmp_path, "b", talk("b?"))
    stored(studio, tmp_path, "pairs", {"prompt": "a?", "chosen": "Yes.", "rejected": "No."})
    picture = {"type": "image_url", "image_url": {"url": "a.png"}}
    shown = {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}
    seen = {"messages": [shown, {"role": "assistant", "content": "A cat."}]}
    stored(studio, tmp_path, "pictures", talk("c?"), seen, seen)
    with pytest.raises(InputError, match=message) as caught:
        mixtures.for_training(studio, spec(dataset="a", **data))
    assert caught.value.field == field


def test_texts_may_be_trained_on_beside_conversations(studio: Studio, tmp_path: Path) -> None:
    stored(studio, tmp_path, "a", talk("a?"))
    stored(studio, tmp_path, "book", {"text": "Once."})
    assert len(mixtures.for_training(studio, spec(dataset="a", mixture="book")).parts) == 2


def test_one_conversation_can_be_trained_on(studio: Studio, tmp_path: Path) -> None:
    stored(studio, tmp_path, "a", talk("a?"))
    assert mixtures.for_training(studio, spec(dataset="a")).evaluation is None


def test_a_file_that_is_gone_is_said_before_the_run(studio: Studio, tmp_path: Path) -> None:
    row = stored(studio, tmp_path, "a", talk("a?"))
    studio.home.dataset(row.sha256).unlink()
    with pytest.raises(NotFoundError, match="The file of dataset 'a' is gone"):
        mixtures.for_training(studio, spec(dataset="a"))


def test_near_duplicates_stay_on_one_side(studio: Studio, tmp_path: Path) -> None:
    talks = [talk(f"Question {n}?") for n in range(90)]
    stored(studio, tmp_path, "a", *talks, *talks[:5], *talks[:5])
    chosen = mixtures.kept_out(studio, spec(dataset="a", eval_share=0.2))
    assert chosen is not None
    assert chosen.sum() == 20
    assert all(chosen[n] == chosen[90 + n] == chosen[95 + n] for n in range(5))
    assert mixtures.kept_out(studio, spec(dataset="a")) is None


def test_overlap_of_training_and_evaluation_is_counted(studio: Studio, tmp_path: Path) -> None:
    talks = [talk(f"Question {n}?") for n in range(20)]
    stored(studio, tmp_path, "a", *talks[:15])
    stored(studio, tmp_path, "b", *talks[12:])
    found = mixtures.overlap(studio, "a", "b")
    assert (found.num_eval, found.exact, found.near) == (8, 3, 0)
    assert found.examples == ((0, 12), (1, 13), (2, 14))
    assert list(studio.home.incoming.iterdir()) == []
