"""Verbs of Datasets."""

import hashlib
import json
from pathlib import Path

import pytest

from studio.errors import InputError, NotFoundError
from studio.services import datasets
from studio.services.studio import Studio

GOOD = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]}


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_the_shipped_example_is_accepted_and_named_by_its_content(studio: Studio) -> None:
    row = datasets.import_example(studio)
    stored = studio.home.dataset(row.sha256).read_bytes()
    assert row.num_conversations == 200
    assert hashlib.sha256(stored).hexdigest() == row.sha256
    assert datasets.example_sha256(datasets.example_file(studio)) == row.sha256


def test_the_same_content_is_stored_once(studio: Studio, tmp_path: Path) -> None:
    first, _ = datasets.import_file(studio, write(tmp_path / "a.jsonl", GOOD))
    second, _ = datasets.import_file(studio, write(tmp_path / "b.jsonl", GOOD), name="other")
    assert first is not None
    assert second is not None
    assert (first.id, first.name) == (second.id, second.name)
    assert len(list(studio.home.datasets.iterdir())) == 1


def test_different_content_of_the_same_name_gets_a_number(studio: Studio, tmp_path: Path) -> None:
    datasets.import_file(studio, write(tmp_path / "a.jsonl", GOOD))
    second, _ = datasets.import_file(studio, write(tmp_path / "a.jsonl", GOOD, GOOD))
    assert second is not None
    assert second.name == "a-2"


def test_a_bad_file_stores_nothing_and_names_line_and_field(studio: Studio, tmp_path: Path) -> None:
    bad = {"messages": [{"role": "bot", "content": "x"}]}
    row, report = datasets.import_file(studio, write(tmp_path / "bad.jsonl", GOOD, bad))
    assert row is None
    assert (report.issues[0].line, report.issues[0].path) == (2, "messages[0].role")
    assert list(studio.home.datasets.iterdir()) == []
    assert list(studio.home.incoming.iterdir()) == []
    assert datasets.listing(studio) == []


def test_a_file_over_the_limit_is_refused_with_both_sizes(studio: Studio, tmp_path: Path) -> None:
    small = Studio(
        home=studio.home,
        database=studio.database,
        dispatch=studio.dispatch,
        settings=studio.settings.model_copy(update={"max_upload_bytes": 10}),
    )
    with pytest.raises(InputError, match="more than the 0 MiB that one file may have"):
        datasets.import_file(small, write(tmp_path / "a.jsonl", GOOD))


def test_a_missing_file_is_named(studio: Studio, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read: no such file"):
        datasets.import_file(studio, tmp_path / "none.jsonl")


def test_an_unknown_dataset_lists_what_there_is(studio: Studio) -> None:
    datasets.import_example(studio)
    with pytest.raises(NotFoundError, match=r"no dataset 'x'.*There are: tidemark-support"):
        datasets.get(studio, "x")


def test_a_dataset_is_found_by_name_number_and_hash(studio: Studio) -> None:
    row = datasets.import_example(studio)
    keys = (row.name, str(row.id), row.sha256)
    assert {datasets.get(studio, key).id for key in keys} == {row.id}


def test_pages_of_conversations_follow_the_file(studio: Studio) -> None:
    row = datasets.import_example(studio)
    everything = datasets.conversations(studio.home, row, 0, 1000)
    assert len(everything) == 200
    assert datasets.conversations(studio.home, row, 7, 3) == everything[7:10]
