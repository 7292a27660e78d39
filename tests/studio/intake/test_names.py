"""What a name says: how a content is laid out, what a Dataset is called, what stands beside data."""

import pytest

from studio.intake.names import beside, dataset_name, suffix_of, telling_name


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("gz.jsonl.gz", "gz"),
        ("chats.jsonl", "chats"),
        ("chats.JSONL.GZ", "chats"),
        ("chats.csv.zip", "chats"),
        ("chats.zip", "chats"),
        ("v1.2", "v1.2"),
        ("v1.2.parquet", "v1.2"),
        ("org/data", "data"),
        ("org/data part.txt", "data part"),
        (".jsonl", ".jsonl"),
        ("", ""),
    ],
)
def test_a_dataset_is_called_as_its_file_without_what_packs_it(file: str, name: str) -> None:
    assert dataset_name(file) == name


def test_the_ending_is_that_of_what_is_packed() -> None:
    assert suffix_of("a/B.Txt.gz") == ".txt"
    assert suffix_of("a.gz") == suffix_of("txt") == suffix_of("") == ""
    assert telling_name("org/data", "train.txt") == "train.txt"
    assert telling_name("book.txt", "data") == "book.txt"
    assert telling_name("data", "shadow") == ""


def test_notes_and_pictures_stand_beside_data_but_not_alone() -> None:
    notes = {
        *("README.txt", "README.md", "readme", "deep/README.de.md", "LICENSE", "LICENSE.txt"),
        *("a.png", "b/c.PDF", "d.jpeg"),
    }
    data = {"a.jsonl", "readme.jsonl", "book.txt", "license.csv", "readmes.txt"}
    assert beside([*notes, *data]) == notes
    assert beside([*notes]) == beside(["README.md"]) == beside([]) == frozenset()
