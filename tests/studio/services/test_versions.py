"""Versions: the overlay, and the Dataset that comes of it; the original never changes."""

import hashlib
import json
import threading
from pathlib import Path

import pytest

from studio.domain.conversation import Conversation, Preference
from studio.errors import ConflictError, InputError, NotFoundError
from studio.services import datasets, versions
from studio.services.studio import Studio
from studio.services.versions import Changes
from studio.store.rows import DatasetRow

NOTHING = Changes(excluded=(), edited=(), tagged=())


def talk(question: str, answer: str = "Yes.") -> dict[str, object]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def stored(studio: Studio, folder: Path, *records: object) -> DatasetRow:
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    row = datasets.import_file(studio, path).row
    assert row is not None
    return row


@pytest.fixture
def row(studio: Studio, tmp_path: Path) -> DatasetRow:
    """Ten conversations."""
    return stored(studio, tmp_path, *(talk(f"Question {n}?", f"Answer {n}.") for n in range(10)))


def questions(studio: Studio, row: DatasetRow) -> list[str]:
    found = []
    for record in datasets.records(studio.home, row, 0, 1000):
        assert isinstance(record, Conversation)
        found.append(record.messages[0].content)
    return found


def test_a_version_has_its_own_hash_and_the_original_keeps_its_bytes(
    studio: Studio, row: DatasetRow
) -> None:
    path = studio.home.dataset(row.sha256)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    versions.exclude(studio, row.name, [2, 5])
    versions.tag(studio, row.name, 1, ["good"])
    versions.edit(studio, row.name, 0, json.dumps(talk("Another?")))
    version = versions.save(studio, row.name)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before == row.sha256
    assert version.sha256 != row.sha256
    assert (version.name, version.parent_id) == ("talks-2", row.id)
    assert version.source == {"type": "version", "name": "talks", "sha256": row.sha256}
    assert version.change == {"excluded": 2, "edited": 1, "tagged": 1}
    kept = [f"Question {n}?" for n in (1, 3, 4, 6, 7, 8, 9)]
    assert questions(studio, version) == ["Another?", *kept]
    assert datasets.records(studio.home, version, 1, 1)[0].tags == ("good",)
    assert version.report["num_conversations"] == version.num_conversations == 8
    assert version.report["format"] == row.report["format"]
    assert versions.changes(studio, row.name) == NOTHING


def test_what_was_excluded_can_be_restored(studio: Studio, row: DatasetRow) -> None:
    versions.exclude(studio, row.name, [1, 3])
    versions.restore(studio, row.name, [1])
    assert versions.changes(studio, row.name) == Changes(excluded=(3,), edited=(), tagged=())
    assert versions.current(studio, row.name, 3).is_excluded
    assert not versions.current(studio, row.name, 1).is_excluded


def test_discarding_forgets_everything(studio: Studio, row: DatasetRow) -> None:
    versions.exclude(studio, row.name, [1])
    versions.tag(studio, row.name, 2, ["a"])
    versions.discard(studio, row.name)
    assert versions.changes(studio, row.name) == NOTHING
    with pytest.raises(ConflictError, match="Nothing of 'talks' was changed"):
        versions.save(studio, row.name)


def test_what_is_written_back_unchanged_is_no_change(studio: Studio, row: DatasetRow) -> None:
    for number in range(3):
        versions.edit(studio, row.name, number, versions.current(studio, row.name, number).text)
        versions.tag(studio, row.name, number, [])
    assert versions.changes(studio, row.name) == NOTHING


def test_a_record_is_shown_as_the_next_version_has_it(studio: Studio, row: DatasetRow) -> None:
    versions.edit(studio, row.name, 4, json.dumps(talk("New?", "<think>Hm.</think>\n\nOld.")))
    versions.tag(studio, row.name, 4, [" two  words ", "b", "b", ""])
    shown = versions.current(studio, row.name, 4)
    assert isinstance(shown.record, Conversation)
    assert shown.record.messages[1].reasoning_content == "Hm."
    assert shown.tags == shown.record.tags == ("two words", "b")
    assert (shown.is_edited, shown.is_excluded) == (True, False)
    assert json.loads(shown.text)["messages"][0]["content"] == "New?"


def test_tags_of_a_version_stay_and_can_be_taken_away(studio: Studio, row: DatasetRow) -> None:
    versions.tag(studio, row.name, 0, ["a"])
    version = versions.save(studio, row.name, "tagged")
    versions.edit(studio, version.name, 0, json.dumps(talk("Edited?")))
    assert versions.current(studio, version.name, 0).tags == ("a",)
    versions.tag(studio, version.name, 0, [])
    last = versions.save(studio, version.name)
    assert datasets.records(studio.home, last, 0, 1)[0].tags == ()
    assert (last.name, last.parent_id) == ("tagged-2", version.id)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": [', r"line 1 is not JSON: expecting value at column"),
        ("[]", "a record is an object with named fields"),
        ('{"text": "x"}', "plain text"),
        (
            '{"messages": [{"role": "bot", "content": "x"}]}',
            r"messages\[0\]\.role: .* \(found bot\)",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            "no assistant message: nothing to learn",
        ),
        (json.dumps(talk("a?", "b <|im_end|>")), r"messages\[1\]\.content: a control token"),
        ('{"messages": [], "messages": []}', "the key stands twice"),
    ],
)
def test_an_edit_obeys_the_rules_of_every_record(
    studio: Studio, row: DatasetRow, text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        versions.edit(studio, row.name, 0, text)
    assert versions.changes(studio, row.name) == NOTHING


@pytest.mark.parametrize("number", [-1, 10, 10**12])
def test_a_record_that_is_not_there_is_named(studio: Studio, row: DatasetRow, number: int) -> None:
    with pytest.raises(NotFoundError, match=f"There is no conversation {number + 1} in 'talks'"):
        versions.exclude(studio, row.name, [0, number])
    with pytest.raises(NotFoundError, match="They go from 1 to 10"):
        versions.current(studio, row.name, number)
    assert versions.changes(studio, row.name) == NOTHING


def test_tags_are_few_and_short(studio: Studio, row: DatasetRow) -> None:
    with pytest.raises(InputError, match="21 tags; at most 20"):
        versions.tag(studio, row.name, 0, [str(n) for n in range(21)])
    with pytest.raises(InputError, match="is too long"):
        versions.tag(studio, row.name, 0, ["x" * 61])


def test_a_version_of_nothing_is_refused(studio: Studio, row: DatasetRow) -> None:
    versions.exclude(studio, row.name, list(range(10)))
    with pytest.raises(InputError, match="Every record of 'talks' is excluded"):
        versions.save(studio, row.name)
    assert len(versions.changes(studio, row.name).excluded) == 10
    assert list(studio.home.incoming.iterdir()) == []


def test_a_version_with_known_content_is_the_dataset_that_has_it(
    studio: Studio, row: DatasetRow
) -> None:
    versions.exclude(studio, row.name, [9])
    first = versions.save(studio, row.name)
    versions.exclude(studio, row.name, [9])
    assert versions.save(studio, row.name, "other").id == first.id
    assert versions.changes(studio, row.name) == NOTHING


def test_a_version_outlives_its_parent(studio: Studio, row: DatasetRow) -> None:
    versions.exclude(studio, row.name, [0])
    version = versions.save(studio, row.name)
    versions.exclude(studio, row.name, [1])
    datasets.delete(studio, row.name)
    kept = datasets.get(studio, version.sha256)
    assert (kept.parent_id, kept.source["name"]) == (None, "talks")
    assert len(questions(studio, kept)) == 9


def test_duplicates_are_excluded_in_one_go(studio: Studio, tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(100)]
    near = talk("Why?", " ".join([*words[:50], "other", *words[51:]]))
    first, other = talk("Why?", " ".join(words)), talk("How?")
    row = stored(studio, tmp_path, first, other, near, other, first)
    assert versions.drop_duplicates(studio, row.name, near=False) == 2
    assert versions.changes(studio, row.name).excluded == (3, 4)
    assert versions.drop_duplicates(studio, row.name, near=False) == 0
    assert versions.drop_duplicates(studio, row.name, near=True) == 1
    assert versions.changes(studio, row.name).excluded == (2, 3, 4)
    assert versions.save(studio, row.name).num_conversations == 2


def test_one_of_a_group_always_stays(studio: Studio, tmp_path: Path) -> None:
    row = stored(studio, tmp_path, *[talk("Why?")] * 4)
    versions.exclude(studio, row.name, [0])
    versions.edit(studio, row.name, 1, json.dumps(talk("Who?")))
    assert versions.drop_duplicates(studio, row.name, near=True) == 1
    assert versions.changes(studio, row.name).excluded == (0, 3)


def test_two_browsers_at_once_lose_nothing_but_what_the_other_wrote(
    studio: Studio, row: DatasetRow
) -> None:
    def browse(name: str) -> None:
        for number in range(10):
            versions.tag(studio, row.name, number, [name])
            versions.exclude(studio, row.name, [number])
            versions.edit(studio, row.name, number, json.dumps(talk(name)))
            versions.restore(studio, row.name, [number])

    browsers = [threading.Thread(target=browse, args=(name,)) for name in ("one", "two")]
    for browser in browsers:
        browser.start()
    for browser in browsers:
        browser.join()
    everything = tuple(range(10))
    assert versions.changes(studio, row.name) == Changes(
        excluded=(), edited=everything, tagged=everything
    )
    version = versions.save(studio, row.name)
    assert set(questions(studio, version)) <= {"one", "two"}


def test_a_change_while_a_version_is_saved_waits_for_the_next(
    studio: Studio, row: DatasetRow
) -> None:
    versions.exclude(studio, row.name, [0, 1])
    saved = threading.Event()

    def change() -> None:
        while not saved.is_set():
            versions.tag(studio, row.name, 1, ["late"])
            versions.tag(studio, row.name, 1, ["later"])

    changer = threading.Thread(target=change)
    changer.start()
    versions.save(studio, row.name)
    saved.set()
    changer.join()
    waiting = versions.changes(studio, row.name)
    assert waiting.tagged == (1,)
    assert waiting.excluded in ((1,), ())


def test_preferences_are_edited_as_preferences(studio: Studio, tmp_path: Path) -> None:
    answers = [[{"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    asked = [{"role": "user", "content": "Well?"}]
    record = {"prompt": asked, "chosen": answers[0], "rejected": answers[1]}
    row = stored(studio, tmp_path, record)
    assert row.kind == "preferences"
    shown = versions.current(studio, row.name, 0)
    versions.edit(studio, row.name, 0, shown.text)
    assert versions.changes(studio, row.name) == NOTHING
    versions.edit(studio, row.name, 0, shown.text.replace("Yes.", "Surely."))
    (changed,) = datasets.records(studio.home, versions.save(studio, row.name), 0, 1)
    assert isinstance(changed, Preference)
    assert changed.chosen[0].content == "Surely."
