"""Verbs of Datasets."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from studio.domain.conversation import Conversation, Kind, PlainText
from studio.errors import ConflictError, InputError, MachineError, NotFoundError
from studio.intake.formats import Mapping
from studio.services import datasets, runs, uploads
from studio.services.studio import Studio
from studio.store.rows import DatasetRow
from tests.fakes import make_studio

GOOD = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]}
BAD = {"messages": [{"role": "bot", "content": "x"}]}


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def talk(question: str, answer: str = "Yes.") -> dict[str, object]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def stored(studio: Studio, path: Path, *records: object, name: str = "") -> DatasetRow:
    row = datasets.import_file(studio, write(path, *records), name).row
    assert row is not None
    return row


def files(studio: Studio) -> set[str]:
    return {path.name for path in studio.home.datasets.iterdir()}


def test_the_shipped_example_is_accepted_and_named_by_its_content(studio: Studio) -> None:
    row = datasets.import_example(studio)
    kept = studio.home.dataset(row.sha256).read_bytes()
    assert row.num_conversations == 200
    assert (row.kind, row.source["type"], row.parent_id) == (Kind.CONVERSATIONS, "example", None)
    assert hashlib.sha256(kept).hexdigest() == row.sha256
    assert datasets.example_sha256(datasets.example_file(studio)) == row.sha256


def test_the_same_content_is_stored_once(studio: Studio, tmp_path: Path) -> None:
    first = datasets.import_file(studio, write(tmp_path / "a.jsonl", GOOD))
    second = datasets.import_file(studio, write(tmp_path / "b.jsonl", GOOD), name="other")
    assert first.row is not None
    assert second.row is not None
    assert (first.row.id, first.row.name) == (second.row.id, second.row.name)
    assert (first.is_new, second.is_new) == (True, False)
    assert files(studio) == {f"{first.row.sha256}.jsonl", f"{first.row.sha256}.index.npy"}
    assert list(studio.home.incoming.iterdir()) == []


def test_a_dataset_remembers_how_it_came(studio: Studio, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    imported = datasets.import_file(studio, path)
    assert imported.row is not None
    assert imported.row.source == {"type": "path", "name": "a.jsonl", "sha256": content}
    assert imported.source_sha256 == content
    source = {"type": "hub", "name": "org/data", "revision": "abc", "sha256": "known"}
    other = write(tmp_path / "b.jsonl", talk("Why?"))
    hub = datasets.import_file(studio, other, source=source).row
    assert hub is not None
    assert (hub.source, hub.source_name, hub.name) == (source, "org/data", "data")


def test_the_name_a_file_had_tells_its_layout_and_names_the_dataset(
    studio: Studio, tmp_path: Path
) -> None:
    arrived = tmp_path / "data"
    arrived.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    row = datasets.import_file(studio, arrived, source={"name": "gz.jsonl.gz"}).row
    assert row is not None
    assert (row.name, row.source_name) == ("gz", "gz.jsonl.gz")
    arrived.write_text("oops\n")
    assert datasets.import_file(studio, arrived, source={"name": "shadow"}).row is None
    refused = datasets.import_file(studio, arrived, source={"name": "a.jsonl"})
    assert [(issue.line, issue.kind) for issue in refused.report.issues] == [(1, "json")]
    assert refused.report == datasets.check_file(arrived, name="a.jsonl")
    text_row = datasets.import_file(studio, arrived, source={"name": "book.txt"}).row
    assert text_row is not None
    assert (text_row.name, text_row.kind) == ("book", Kind.TEXTS)


def test_different_content_of_the_same_name_gets_a_number(studio: Studio, tmp_path: Path) -> None:
    stored(studio, tmp_path / "a.jsonl", GOOD)
    assert stored(studio, tmp_path / "a.jsonl", GOOD, GOOD).name == "a-2"


def test_a_bad_file_stores_nothing_and_names_line_and_field(studio: Studio, tmp_path: Path) -> None:
    imported = datasets.import_file(studio, write(tmp_path / "bad.jsonl", GOOD, BAD))
    assert imported.row is None
    first = imported.report.issues[0]
    assert (first.line, first.path) == (2, "messages[0].role")
    assert imported.report.is_salvageable
    assert files(studio) == set()
    assert datasets.listing(studio) == []
    assert imported.rejects is not None
    assert list(studio.home.incoming.iterdir()) == [imported.rejects]
    reject = json.loads(imported.rejects.read_text())
    assert (reject["line"], json.loads(reject["text"])) == (2, BAD)


def test_bad_records_are_dropped_when_asked_and_can_be_looked_at(
    studio: Studio, tmp_path: Path
) -> None:
    path = write(tmp_path / "bad.jsonl", BAD, GOOD, BAD)
    imported = datasets.import_file(studio, path, drop_rejected=True)
    assert imported.row is not None
    assert imported.row.num_conversations == 1
    assert imported.row.report["num_rejected"] == 2
    assert imported.rejects == datasets.rejects(studio.home, imported.row)
    assert imported.rejects is not None
    assert len(imported.rejects.read_text().splitlines()) == 2
    assert list(studio.home.incoming.iterdir()) == []
    again = datasets.import_file(studio, path, drop_rejected=True)
    assert (again.is_new, again.rejects) == (False, imported.rejects)


def test_a_file_of_bad_records_only_stores_nothing_even_then(
    studio: Studio, tmp_path: Path
) -> None:
    imported = datasets.import_file(studio, write(tmp_path / "b.jsonl", BAD), drop_rejected=True)
    assert imported.row is None
    assert not imported.report.is_salvageable
    assert files(studio) == set()


def test_checking_a_file_stores_nothing_and_finds_the_same(studio: Studio, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, BAD, GOOD)
    report = datasets.check_file(path, rejects=tmp_path / "rejects.jsonl")
    assert report == datasets.import_file(studio, path).report
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 1
    assert files(studio) == set()
    with pytest.raises(InputError, match="more than the 0 MiB"):
        datasets.check_file(path, max_bytes=10)


def test_a_third_of_duplicates_is_a_warning_with_count_and_lines(
    studio: Studio, tmp_path: Path
) -> None:
    talks = [talk(f"Question {n} about {n * 7}?") for n in range(70)]
    report = datasets.check_file(write(tmp_path / "a.jsonl", *talks, *talks[:30]))
    assert report.counts["duplicate"] == 30
    assert (report.num_warnings, report.num_errors) == (30, 0)
    found = [issue for issue in report.issues if issue.kind == "duplicate"]
    assert str(found[2]) == "line 73: the same conversation as line 3"
    assert stored(studio, tmp_path / "a.jsonl", *talks, *talks[:30]).num_conversations == 100


def test_near_duplicates_are_named_by_line(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(100)]
    other = [*words[:40], "other", *words[41:]]
    records = (talk("Why?", " ".join(words)), GOOD, talk("Why?", " ".join(other)))
    path = write(tmp_path / "a.jsonl", *records)
    path.write_text("\n\n" + path.read_text())
    report = datasets.check_file(path)
    assert report.num_near_duplicates == report.counts["near_duplicate"] == 1
    assert [str(issue) for issue in report.issues if issue.kind == "near_duplicate"] == [
        "line 5: nearly the same conversation as line 3"
    ]


def test_a_file_over_the_limit_is_refused_with_both_sizes(studio: Studio, tmp_path: Path) -> None:
    small = replace(studio, settings=studio.settings.model_copy(update={"max_upload_bytes": 10}))
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


def test_pages_of_records_follow_the_file(studio: Studio) -> None:
    row = datasets.import_example(studio)
    everything = datasets.records(studio.home, row, 0, 1000)
    assert len(everything) == 200
    assert datasets.records(studio.home, row, 7, 3) == everything[7:10]


def test_a_text_is_found_in_what_one_role_says(studio: Studio, tmp_path: Path) -> None:
    row = stored(studio, tmp_path / "a.jsonl", talk("tide?", "moon"), talk("moon?", "TIDE"))
    home = studio.home
    assert datasets.find(home, row, "tide") == 0
    assert datasets.find(home, row, "tide", 1) == 1
    assert datasets.find(home, row, "tide", 1, ignore_case=False) is None
    assert datasets.find(home, row, "tide", role="assistant") == 1
    assert datasets.find(home, row, "tide", 2) is None


def test_tables_and_texts_become_datasets_too(studio: Studio, tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("ask me,tell me\na?,b.\n")
    row = datasets.import_file(
        studio, table, mapping=Mapping(user="ask me", assistant="tell me")
    ).row
    assert row is not None
    (record,) = datasets.records(studio.home, row, 0, 1)
    assert isinstance(record, Conversation)
    assert row.sha256 == stored(studio, tmp_path / "same.jsonl", GOOD).sha256
    text_row = stored(studio, tmp_path / "text.jsonl", {"text": "Once."}, {"text": "Twice."})
    assert text_row.kind == Kind.TEXTS
    assert datasets.records(studio.home, text_row, 1, 1) == [PlainText(text="Twice.")]


# ---- rename, export, delete -------------------------------------------------------------------


def test_a_dataset_is_renamed_unless_the_name_is_taken(studio: Studio, tmp_path: Path) -> None:
    row = stored(studio, tmp_path / "a.jsonl", GOOD)
    stored(studio, tmp_path / "b.jsonl", talk("Why?"))
    assert datasets.rename(studio, "a", "  my\ndata ").name == "my data"
    assert datasets.rename(studio, row.sha256, "my data").name == "my data"
    with pytest.raises(ConflictError, match="Another dataset is named 'b'"):
        datasets.rename(studio, "my data", "b")
    with pytest.raises(InputError, match="The name is empty"):
        datasets.rename(studio, "my data", " \n")


@pytest.mark.parametrize(
    "name",
    ["é" * 255, "🌊 tide", "\u202egnp.exe", "'; rm -rf /", "two\nlines", "../../etc/passwd", "a,b"],
)
def test_any_name_is_stored_as_text(studio: Studio, tmp_path: Path, name: str) -> None:
    row = stored(studio, tmp_path / "a.jsonl", GOOD, name=name)
    assert row.name.isprintable()
    assert datasets.get(studio, row.name).id == row.id
    path = datasets.export(studio, row, tmp_path)
    assert path.parent == tmp_path
    assert path.exists()
    assert files(studio) == {f"{row.sha256}.jsonl", f"{row.sha256}.index.npy"}


def test_an_exported_dataset_is_the_same_dataset_again(studio: Studio, tmp_path: Path) -> None:
    row = datasets.import_example(studio)
    path = datasets.export(studio, row, tmp_path)
    again = datasets.import_file(studio, path)
    assert (again.row and again.row.id, again.is_new) == (row.id, False)


def test_a_deleted_dataset_takes_its_files_along(studio: Studio, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, BAD)
    row = datasets.import_file(studio, path, drop_rejected=True).row
    assert row is not None
    assert len(files(studio)) == 3
    datasets.delete(studio, row.name)
    assert files(studio) == set()
    with pytest.raises(NotFoundError):
        datasets.get(studio, row.sha256)


def test_a_dataset_that_runs_have_used_stays(studio: Studio, tmp_path: Path) -> None:
    row = datasets.import_example(studio)
    spec = runs.spec_from_preset(studio, "tiny-qwen3.5", {"data": {"dataset": row.name}})
    run = runs.submit(studio, spec)
    with pytest.raises(ConflictError, match=f"is part of 1 runs: {run.id}"):
        datasets.delete(studio, row.name)
    mixed = stored(studio, tmp_path / "a.jsonl", GOOD)
    with studio.database.write() as session:
        session.execute(
            text("UPDATE runs SET spec = json_set(spec, '$.data.eval_dataset', :sha)"),
            {"sha": mixed.sha256},
        )
    with pytest.raises(ConflictError, match=f"is part of 1 runs: {run.id}"):
        datasets.delete(studio, mixed.name)
    assert datasets.records(studio.home, mixed, 0, 9) != []


# ---- faults -----------------------------------------------------------------------------------


def test_a_file_that_is_gone_is_named_and_comes_back(studio: Studio, tmp_path: Path) -> None:
    row = stored(studio, tmp_path / "a.jsonl", GOOD)
    studio.home.dataset(row.sha256).unlink()
    with pytest.raises(NotFoundError, match="The file of dataset 'a' is gone"):
        datasets.records(studio.home, row, 0, 1)
    assert not datasets.import_file(studio, tmp_path / "a.jsonl").is_new
    assert len(datasets.records(studio.home, row, 0, 9)) == 1


def test_a_file_that_was_changed_is_named_and_comes_back(studio: Studio, tmp_path: Path) -> None:
    row = stored(studio, tmp_path / "a.jsonl", GOOD)
    with studio.home.dataset(row.sha256).open("ab") as file:
        file.write(b"more\n")
    with pytest.raises(NotFoundError, match="was changed from outside: it has"):
        datasets.records(studio.home, row, 0, 1)
    stored(studio, tmp_path / "a.jsonl", GOOD)
    assert len(datasets.records(studio.home, row, 0, 9)) == 1


def test_two_people_store_the_same_file_at_once(studio: Studio, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(talk(f"Question {n}?") for n in range(300)))
    barrier, found = threading.Barrier(4), list[datasets.Imported]()

    def store() -> None:
        barrier.wait()
        found.append(datasets.import_file(studio, path))

    threads = [threading.Thread(target=store) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(imported.is_new for imported in found) == [False, False, False, True]
    assert len({imported.row.id for imported in found if imported.row}) == 1
    assert len(files(studio)) == 2
    assert list(studio.home.incoming.iterdir()) == []


def test_one_stores_what_another_removes(studio: Studio, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)

    def remove() -> None:
        for _ in range(20):
            for row in datasets.listing(studio):
                try:
                    datasets.delete(studio, row.sha256)
                except NotFoundError:
                    continue

    remover = threading.Thread(target=remove)
    remover.start()
    for _ in range(20):
        datasets.import_file(studio, path)
    remover.join()
    for row in datasets.listing(studio):
        assert len(datasets.records(studio.home, row, 0, 9)) == 1
    assert len(files(studio)) == 2 * len(datasets.listing(studio))


def test_a_database_that_cannot_be_written_keeps_no_files(studio: Studio, tmp_path: Path) -> None:
    with studio.database.write() as session:
        session.execute(
            text(
                "CREATE TRIGGER full BEFORE INSERT ON datasets "
                "BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
            )
        )
    with pytest.raises(MachineError, match="The disk is full"):
        datasets.import_file(studio, write(tmp_path / "a.jsonl", GOOD))
    assert files(studio) == set()
    assert list(studio.home.incoming.iterdir()) == []


def test_a_disk_without_room_is_said_before_anything_is_read(
    studio: Studio, tmp_path: Path
) -> None:
    full = replace(studio, settings=studio.settings.model_copy(update={"min_free_bytes": 2**60}))
    with pytest.raises(MachineError, match="GiB free"):
        datasets.import_file(full, write(tmp_path / "a.jsonl", GOOD))


def test_a_file_that_outgrows_the_disk_leaves_nothing(tmp_path: Path) -> None:
    home = make_studio(tmp_path / "home").home
    source = write(tmp_path / "a.jsonl", *(talk(f"Question {n}?") for n in range(5000)))
    code = (
        "import resource, signal, sys; from pathlib import Path; "
        "from tests.fakes import make_studio; from studio.services import datasets; "
        "studio = make_studio(Path(sys.argv[1])); "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "datasets.import_file(studio, Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(home.path), str(source)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "File too large" in ended.stderr
    assert list(home.datasets.iterdir()) == []
    assert list(home.incoming.iterdir()) == []


def test_an_import_that_is_killed_leaves_no_dataset_and_is_swept(
    studio: Studio, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", *(talk(f"Question {n}?") for n in range(30_000)))
    code = (
        "import sys; from pathlib import Path; from tests.fakes import make_studio; "
        "from studio.services import datasets; "
        "datasets.import_file(make_studio(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(studio.home.path), str(source)])
    while not any(studio.home.incoming.glob("import-*/canonical.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    assert uploads.sweep(studio, time.time() + 10**6) == 0  # it is being written
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert datasets.listing(studio) == []
    assert files(studio) == set()
    assert uploads.sweep(studio, time.time() + 10**6) == 1
    assert list(studio.home.incoming.iterdir()) == []
