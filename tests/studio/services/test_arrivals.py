"""Files on their way: kept until somebody decides, removed when they are stored or given up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from studio.errors import InputError, NotFoundError
from studio.intake.read import no_progress
from studio.services import arrivals, datasets, uploads
from studio.services.receiving import Receiver
from studio.services.studio import Studio
from tests.fakes import make_studio
from tests.studio.intake.test_sources import SHA, hub_site, served

GOOD = {"messages": [{"role": "user", "content": "Ebb?"}, {"role": "assistant", "content": "No."}]}
BAD = {"messages": [{"role": "bot", "content": "x"}]}


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return make_studio(tmp_path / "home")


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def question(number: int) -> dict[str, object]:
    return json.loads(json.dumps(GOOD).replace("Ebb?", f"Ebb {number}?"))  # type: ignore[no-any-return]


def upload(studio: Studio, path: Path) -> str:
    content = path.read_bytes()
    created = uploads.create(studio, path.name, len(content))
    receiver = Receiver(studio)
    writing = receiver.open(created.id, 0)
    writing.write(content)
    return receiver.close(writing).id


def test_an_upload_is_removed_when_it_is_stored(studio: Studio, tmp_path: Path) -> None:
    number = upload(studio, write(tmp_path / "chats.jsonl", GOOD))
    (arrival,) = arrivals.from_uploads(studio, json.dumps([number]))

    imported = arrivals.take(studio, arrival)

    assert imported.row is not None
    assert imported.row.name == "chats"
    assert imported.row.source["sha256"] == arrival.origin["sha256"]
    with pytest.raises(NotFoundError):
        uploads.find(studio, number)


def test_an_upload_with_faults_waits_until_the_good_ones_are_kept(
    studio: Studio, tmp_path: Path
) -> None:
    number = upload(studio, write(tmp_path / "chats.jsonl", GOOD, BAD))
    (arrival,) = arrivals.from_uploads(studio, json.dumps([number]))

    refused = arrivals.take(studio, arrival)
    assert refused.row is None
    assert datasets.listing(studio) == []
    assert uploads.find(studio, number).is_finished
    kept = arrivals.take(studio, arrival, drop_rejected=True)

    assert kept.row is not None
    assert kept.row.num_conversations == 1


def test_an_upload_that_is_given_up_is_gone(studio: Studio, tmp_path: Path) -> None:
    number = upload(studio, write(tmp_path / "chats.jsonl", BAD))
    (arrival,) = arrivals.from_uploads(studio, json.dumps([number]))

    arrivals.discard(studio, arrival)

    with pytest.raises(NotFoundError, match="Add it again"):
        arrivals.take(studio, arrival)


def test_a_path_on_the_server_is_read_in_place_and_stays(studio: Studio, tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", GOOD)
    arrival = arrivals.from_source(studio, str(file), no_progress)

    imported = arrivals.take(studio, arrival)
    arrivals.discard(studio, arrival)

    assert imported.row is not None
    assert imported.row.source["source"] == str(file)
    assert file.exists()
    assert not [item for item in studio.home.incoming.iterdir() if item.name.startswith("fetch")]


def test_the_shards_of_a_folder_become_one_dataset(studio: Studio, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder / "b.jsonl", question(2), BAD)
    (folder / "a.json").write_text(json.dumps([question(0), question(1)]))
    (folder / ".hidden").write_text("not data")
    (folder / "link.jsonl").symlink_to(write(tmp_path / "elsewhere.jsonl", GOOD))
    shares: list[float] = []

    imported = arrivals.take(
        studio, arrivals.from_path(folder), drop_rejected=True, progress=shares.append
    )

    assert imported.row is not None
    assert (imported.row.name, imported.row.num_conversations) == ("shards", 3)
    assert [(issue.file, issue.line) for issue in imported.report.issues] == [("b.jsonl", 2)]
    assert shares == sorted(shares)
    found = datasets.records(studio.home, imported.row, 0, 3)
    assert [record.messages[0].content for record in found] == [  # type: ignore[union-attr]
        "Ebb 0?",
        "Ebb 1?",
        "Ebb 2?",
    ]


def test_the_shards_of_a_hub_dataset_become_one_at_a_pinned_commit(studio: Studio) -> None:
    shards = [json.dumps(question(number)).encode() + b"\n" for number in range(2)]
    files = {f"data/train-0000{n}-of-00002.jsonl": shard for n, shard in enumerate(shards)}
    with served(hub_site({"README.md": b"# card", **files})) as address:
        settings = studio.settings.model_copy(update={"hub_endpoint": f"http://{address}"})
        fetching = replace(studio, settings=settings)
        arrival = arrivals.from_source(fetching, "org/name", no_progress)

    imported = arrivals.take(studio, arrival)

    assert imported.row is not None
    assert (imported.row.name, imported.row.num_conversations) == ("name", 2)
    assert imported.row.source["type"] == "hub"
    assert imported.row.source["revision"] == SHA
    assert not arrival.path.exists()


def test_an_empty_folder_is_said(studio: Studio, tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()

    imported = arrivals.take(studio, arrivals.from_path(folder))

    assert imported.row is None
    assert "holds no files" in str(imported.report.issues[0])


def test_a_source_that_fails_leaves_no_folder(studio: Studio, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="There is no file"):
        arrivals.from_source(studio, str(tmp_path / "none.jsonl"), no_progress)

    assert list(studio.home.incoming.iterdir()) == []


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, "none is chosen"),
        ({"user": "a"}, "user = a"),
        ({"user": "a", "assistant": "a"}, "a column of its own"),
        ({"user": "a", "assistant": "b", "text": "c"}, "not both"),
    ],
)
def test_a_choice_of_columns_that_is_not_clear_is_said(columns: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        arrivals.mapping_of(columns)
