"""The Datasets page in a real browser: faults and what to do with them, the inspector, versions."""

import csv
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Download, Locator, Page, expect

from tests.e2e.browsing import START, Watched, shoot, tab, type_in
from tests.e2e.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_GOOD = 12
EVIL = "<img src=x onerror=alert(1)><b>bold</b>"
THOUGHT = "They ask about the tide."


def tide(number: int) -> dict[str, Any]:
    """Return a conversation of two questions, both answered after a thought."""
    messages: list[dict[str, str]] = [{"role": "system", "content": "You know the tides."}]
    for question, answer in (("When is high tide", "At noon."), ("And the next", "At midnight.")):
        messages += [
            {"role": "user", "content": f"{question} {number}?"},
            {"role": "assistant", "reasoning_content": THOUGHT, "content": f"{answer} ({number})"},
        ]
    return {"messages": messages}


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def watched(browser: Browser, running: Running) -> Watched:
    watched = Watched(browser, running)
    watched.page.goto(running.url)
    expect(watched.page.get_by_text("No dataset yet")).to_be_visible(timeout=START)
    return watched


def add(page: Page, *files: Path) -> Locator:
    page.locator("#upload input[type=file]").set_input_files(files)
    return page.locator("#dataset-answer")


def choose(page: Page, elem_id: str, option: str) -> None:
    page.locator(f"#{elem_id} input").click()
    page.get_by_role("option", name=option).first.click()


def rows(running: Running, query: str) -> list[Any]:
    with sqlite3.connect(running.home.database) as connection:
        return connection.execute(query).fetchall()


def test_the_first_dataset_is_shown_at_once_and_literally(watched: Watched, tmp_path: Path) -> None:
    page, file = watched.page, tmp_path / "first.jsonl"
    talk = tide(0)
    talk["messages"][1]["content"] = EVIL
    file.write_text(lines(talk))
    expect(add(page, file)).to_contain_text("first is ready: 1 conversation.")
    expect(page.locator("#dataset-report")).to_contain_text("1 of 1 records")
    tab(page, "Record by record")
    preview = page.locator("#dataset-preview")
    expect(preview.locator(".bubble.user").first).to_contain_text(EVIL)
    assert preview.locator("img, b b, .bubble div b").count() == 0
    tab(page, "As the model reads it")
    expect(page.locator("#dataset-tokens")).to_contain_text(EVIL)
    tab(page, "As a conversation")
    tab(page, "What was found")


def test_good_lines_are_kept_with_one_click_and_the_rejects_are_downloaded(
    watched: Watched, running: Running, tmp_path: Path
) -> None:
    page, file = watched.page, tmp_path / "tides.jsonl"
    good = [tide(number) for number in range(NUM_GOOD)]
    file.write_text(lines(good[0], {"messages": [{"role": "bot", "content": "x"}]}, *good[1:]))
    answer = add(page, file)
    expect(answer).to_contain_text("tides.jsonl was not stored: 1 error in 13 lines")
    assert rows(running, "SELECT name FROM datasets") == [("first",)]
    with page.expect_download() as downloading:
        page.locator("#dataset-rejects").click()
    rejects = read_download(downloading.value, tmp_path)
    assert [reject["line"] for reject in rejects] == [2]
    assert rejects[0]["findings"]
    expect(page.locator("#dataset-keep")).to_have_text(f"Keep the {NUM_GOOD} good, drop 1")
    page.locator("#dataset-keep").click()
    expect(answer).to_contain_text(f"tides is ready: {NUM_GOOD} conversations, 1 dropped")
    expect(page.locator("#dataset-report")).to_contain_text(f"{NUM_GOOD} of 13 records")
    assert rows(running, "SELECT num_conversations FROM datasets WHERE name = 'tides'") == [
        (NUM_GOOD,)
    ]


def read_download(download: Download, folder: Path) -> list[Any]:
    path = folder / "rejects.jsonl"
    download.save_as(path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_content_is_said_to_be_there(watched: Watched, tmp_path: Path) -> None:
    file = tmp_path / "again.jsonl"
    file.write_text(lines(*(tide(number) for number in range(NUM_GOOD))))
    expect(add(watched.page, file)).to_contain_text("there already, as tides")


def test_a_table_is_read_once_its_columns_are_named(watched: Watched, tmp_path: Path) -> None:
    page, file = watched.page, tmp_path / "tabelle.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=";")
        writer.writerows([("Frage", "Antwort"), ("Was ist eine Ebbe?", "Fallendes\nWasser.")])
    answer = add(page, file)
    expect(answer).to_contain_text("a table with 2 columns")
    page.locator("#dataset-columns-use").click()
    expect(page.get_by_text("The columns are not clear yet").first).to_be_visible()
    shoot(page, "datasets-columns")
    choose(page, "dataset-column-user", "Frage")
    choose(page, "dataset-column-assistant", "Antwort")
    page.locator("#dataset-columns-use").click()
    expect(answer).to_contain_text("tabelle is ready: 1 conversation")


def test_a_path_on_the_server_is_added_and_a_wrong_one_is_said(
    watched: Watched, tmp_path: Path
) -> None:
    page = watched.page
    page.get_by_text("From this machine, the Hub or an address").click()
    type_in(page, "dataset-source", str(tmp_path / "none.jsonl"))
    page.locator("#dataset-source-add").click()
    expect(page.get_by_text("none.jsonl").last).to_be_visible()
    type_in(page, "dataset-source", "https://127.0.0.1/private.jsonl")
    page.locator("#dataset-source-add").click()
    expect(page.get_by_text("STUDIO_ALLOW_PRIVATE_URLS").first).to_be_visible()
    file = tmp_path / "shared.jsonl"
    file.write_text(lines({"instruction": "Say ebb.", "input": "", "output": "Ebb."}))
    type_in(page, "dataset-source", str(file))
    page.locator("#dataset-source-add").click()
    expect(page.locator("#dataset-report")).to_contain_text("Recognised as Alpaca")
    assert file.exists()


def test_the_inspector_follows_model_thinking_and_cutoff(watched: Watched) -> None:
    page = watched.page
    choose(page, "dataset-pick", "tides")
    tab(page, "Record by record")
    tab(page, "As the model reads it")
    view = page.locator("#dataset-tokens .tokens")
    thought, answer = view.locator(".t.think.learned"), view.locator(".t.answer.learned")
    expect(view).to_contain_text("Example 2 of 2")
    expect(thought.first).to_contain_text(THOUGHT)
    expect(answer.first).to_contain_text("At noon. (0)")
    expect(view.locator(".t.user.learned")).to_have_count(0)
    shoot(page, "datasets-thinking")
    choose(page, "inspect-thinking", "mask")
    expect(thought).to_have_count(0)
    expect(view.locator(".t.think").first).to_contain_text(THOUGHT)
    choose(page, "inspect-thinking", "strip")
    expect(view).not_to_contain_text(THOUGHT)
    choose(page, "inspect-thinking", "train")
    choose(page, "inspect-model", "Tiny Qwen3-Next (random weights)")
    expect(view).to_contain_text("not written by this model's template")
    type_in(page, "inspect-cutoff", "few")
    page.locator("#inspect-cutoff input, #inspect-cutoff textarea").press("Enter")
    expect(page.locator("#dataset-tokens")).to_contain_text("data.max_length_tokens is 'few'")
    expect(view).to_have_count(0)
    choose(page, "inspect-truncation", "cut")
    type_in(page, "inspect-cutoff", "48")
    page.locator("#inspect-cutoff input, #inspect-cutoff textarea").press("Enter")
    expect(view.locator(".t.user.cut").first).to_contain_text("When is high tide 0?")
    expect(view.locator(".t.system.cut")).to_have_count(0)


def test_a_dataset_is_counted_in_the_tokens_of_a_model(watched: Watched) -> None:
    page = watched.page
    tab(page, "In tokens")
    figures = page.locator("#dataset-stats")
    page.locator("#stats-count").click()
    expect(figures).to_contain_text(f"{NUM_GOOD} conversations as tiny/qwen3.5 reads them")
    expect(figures).to_contain_text("Nothing is cut")
    expect(figures.locator("svg.histogram rect").first).to_be_visible()
    type_in(page, "stats-cutoff", "40")
    choose(page, "stats-truncation", "cut")
    page.locator("#stats-count").click()
    expect(figures).to_contain_text(f"{NUM_GOOD} of {NUM_GOOD} conversations are longer than 40")
    shoot(page, "datasets-cutoff")


def test_a_changed_record_becomes_a_version_and_the_original_stays(
    watched: Watched, running: Running
) -> None:
    page = watched.page
    ((sha256,),) = rows(running, "SELECT sha256 FROM datasets WHERE name = 'tides'")
    before = running.home.dataset(sha256).read_bytes()
    tab(page, "Record by record")
    tab(page, "As a conversation")
    # What is shown is changed, not what is typed and not gone to.
    type_in(page, "dataset-number", "9")
    page.locator("#dataset-exclude").click()
    expect(page.locator("#dataset-record-state")).to_contain_text("1 of 12 · excluded")
    expect(page.locator("#dataset-changes")).to_contain_text("1 excluded")
    page.locator("#dataset-forward").click()
    expect(page.locator("#dataset-preview")).to_contain_text("When is high tide 1?")
    type_in(page, "dataset-tags", "checked, tide")
    page.locator("#dataset-tags input, #dataset-tags textarea").press("Enter")
    expect(page.locator("#dataset-changes")).to_contain_text("1 excluded, 1 tagged")
    shoot(page, "datasets-version")
    page.locator("#dataset-version-save").click()
    expect(page.locator("#dataset-pick input")).to_have_value("tides-2 · 11 conversations")
    tab(page, "What was found")
    expect(page.locator("#dataset-report")).to_contain_text("a version of tides")
    ((parent, text),) = rows(
        running, "SELECT parent_id, sha256 FROM datasets WHERE name = 'tides-2'"
    )
    ((tides,),) = rows(running, "SELECT id FROM datasets WHERE name = 'tides'")
    assert parent == tides
    assert b'"tags":["checked","tide"]' in running.home.dataset(text).read_bytes()
    assert running.home.dataset(sha256).read_bytes() == before


def test_a_mixture_is_counted_before_it_is_launched(watched: Watched) -> None:
    page = watched.page
    tab(page, "Train")
    choose(page, "field-data-dataset", "tides ·")
    page.get_by_text("Advanced", exact=True).click()
    page.get_by_role("button", name=re.compile(r"^Data\W*$")).click()
    type_in(page, "field-data-mixture", "tabelle: 3")
    page.locator("#train-count").click()
    epoch = page.locator("#train-epoch")
    expect(epoch).to_contain_text("tabelle")
    expect(epoch).to_contain_text("tokens an epoch")
    shoot(page, "train-mixture")


def test_a_cutoff_that_drops_conversations_is_confirmed_before_the_launch(
    watched: Watched, running: Running
) -> None:
    page = watched.page
    type_in(page, "field-data-mixture", " ")
    type_in(page, "field-data-max_length_tokens", "40")
    choose(page, "field-data-truncation", "cut")
    page.locator("#train-launch").click()
    expect(page.locator("#train-trouble")).to_contain_text("12 conversations keep nothing")
    assert rows(running, "SELECT count(*) FROM runs") == [(0,)]
    page.locator("#train-launch").click()
    expect(page.locator("#run-head")).to_contain_text("0 of 12 conversations", timeout=START)
    assert rows(running, "SELECT count(*) FROM runs") == [(1,)]


def test_nothing_went_wrong_in_the_browser(watched: Watched) -> None:
    assert watched.foreign == []
    assert watched.errors == []
