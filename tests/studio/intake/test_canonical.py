"""The canonical file: written once, reached by number, searched, and its index made anew."""

import hashlib
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from studio.domain.conversation import (
    Conversation,
    Image,
    Kind,
    Message,
    PlainText,
    Record,
    ToolCall,
)
from studio.intake.canonical import INDEX, Canonical, Writer, Written


def talk(question: str, answer: str) -> Conversation:
    return Conversation(
        messages=(
            Message(role="user", content=question),
            Message(role="assistant", content=answer),
        )
    )


def write(folder: Path, *records: Record) -> Written:
    with Writer(folder) as writer:
        for record in records:
            writer.add(record)
        return writer.finish(type(records[0]))


def opened(written: Written, kind: Kind = Kind.CONVERSATIONS) -> Canonical:
    return Canonical(written.path, written.index, kind)


TALKS = [talk(f"Question {n}, äöü \u2028?", "Answer\n" * n + "end") for n in range(50)]


def test_what_was_written_is_read_in_any_order(tmp_path: Path) -> None:
    written = write(tmp_path, *TALKS)
    with opened(written) as canonical:
        assert len(canonical) == written.num_records == 50
        numbers = random.Random(0).sample(range(50), 50)
        assert [canonical[number] for number in numbers] == [TALKS[number] for number in numbers]
        assert list(canonical) == TALKS
        assert canonical.slice(48, 10) == TALKS[48:]
        assert canonical.slice(-3, 4) == TALKS[:1]
        with pytest.raises(IndexError):
            canonical[50]


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    written = write(tmp_path, *TALKS)
    content = written.path.read_bytes()
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    assert written.size_bytes == len(content)
    assert content == b"".join(record.to_line() for record in TALKS)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "foreign", "other", "longer"])
def test_an_index_that_does_not_fit_is_made_anew(tmp_path: Path, damage: str) -> None:
    written = write(tmp_path, *TALKS, TALKS[3])
    whole = written.index.read_bytes()
    if damage == "missing":
        written.index.unlink()
    elif damage == "foreign":
        written.index.write_bytes(b"no index at all")
    elif damage == "other":
        np.save(written.index, np.zeros(51, np.int64))
    elif damage == "longer":
        with written.path.open("ab") as file:
            file.write(TALKS[4].to_line())
    else:
        written.index.write_bytes(whole[: {"cut": -20, "empty": 0}[damage]])
    with opened(written) as canonical:
        assert canonical[49] == TALKS[49]
        assert canonical.groups[50] == 3
    assert np.load(written.index).dtype == INDEX
    assert (written.index.read_bytes() == whole) == (damage != "longer")
    assert {path.name for path in tmp_path.iterdir()} == {"canonical.jsonl", "canonical.index.npy"}


def test_groups_are_the_first_of_their_kind(tmp_path: Path) -> None:
    written = write(tmp_path, TALKS[0], TALKS[1], TALKS[0], TALKS[1])
    with opened(written) as canonical:
        assert canonical.groups.tolist() == [0, 1, 0, 1]
        assert canonical.equals().tolist() == [0, 1, 0, 1]
    assert written.duplicates.exact.tolist() == [[2, 0], [3, 1]]


def test_a_text_is_found_from_a_place_on(tmp_path: Path) -> None:
    with opened(write(tmp_path, *TALKS)) as canonical:
        assert canonical.find("Question 7,") == 7
        assert canonical.find("Question 7,", 8) is None
        assert canonical.find("Question", 20) == 20
        assert canonical.find("question 33, ÄÖ") is None
        assert canonical.find("question 33, ÄÖ", ignore_case=True) == 33
        assert list(canonical.hits("Question 4", 40)) == list(range(40, 50))
        assert canonical.find("", 5) == 5
        assert canonical.find("Question", 50) is None


@pytest.mark.parametrize(
    "text", ['say "hi"', "back\\slash", "tab\t", "line\nfeed", "\u0001", "日本", "ß"]
)
@pytest.mark.parametrize("ignore_case", [False, True])
def test_what_json_escapes_is_found(tmp_path: Path, text: str, ignore_case: bool) -> None:
    with opened(write(tmp_path, TALKS[0], talk(f"before{text}after", "."))) as canonical:
        assert canonical.find(text, ignore_case=ignore_case) == 1
        assert canonical.find(f"e{text}a", ignore_case=ignore_case) == 1


@pytest.mark.parametrize("text", ["role", "assistant", '"content"', "user", '"},{"'])
def test_names_of_fields_are_no_text(tmp_path: Path, text: str) -> None:
    with opened(
        write(tmp_path, *TALKS, talk("the role of an assistant", '"content"'))
    ) as canonical:
        assert canonical.find(text) in (50, None)
        assert canonical.find(text, ignore_case=True) in (50, None)


def test_thinking_and_calls_are_searched_too(tmp_path: Path) -> None:
    thought = Message(role="assistant", content="Yes.", reasoning_content="I wonder.")
    call = Message(
        role="assistant", tool_calls=(ToolCall(name="get_tide", arguments={"at": "Rye"}),)
    )
    records = [Conversation(messages=(message,)) for message in (thought, call)]
    with opened(write(tmp_path, *records)) as canonical:
        assert canonical.find("wonder") == 0
        assert canonical.find("get_tide") == 1
        assert canonical.find("Rye") == 1


def test_the_first_record_with_an_image_is_found(tmp_path: Path) -> None:
    shown = Message(role="user", content="See", images=(Image(at=0, ref="a.png"),))
    argument = ToolCall(name="draw", arguments={"images": [1]})
    calls = Conversation(messages=(Message(role="assistant", tool_calls=(argument,)),))
    written = write(tmp_path, talk('"images":[', "x"), calls, Conversation(messages=(shown,)))
    with opened(written) as canonical:
        assert canonical.first_with_images() == 2
    (tmp_path / "b").mkdir()
    with opened(write(tmp_path / "b", calls)) as canonical:
        assert canonical.first_with_images() is None


def test_texts_are_read_as_texts(tmp_path: Path) -> None:
    written = write(tmp_path, PlainText(text="one"), PlainText(text="two"))
    with opened(written, Kind.TEXTS) as canonical:
        assert list(canonical) == [PlainText(text="one"), PlainText(text="two")]
    with opened(written) as canonical, pytest.raises(msgspec.ValidationError):
        canonical[0]
