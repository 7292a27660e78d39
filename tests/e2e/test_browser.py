"""The main job in a real browser: upload, launch, watch, reload, stop, launch, merge, chat."""

import json
import re
import sqlite3
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, TimeoutError, expect

from studio.disk import TEMPLATES
from tests.e2e.browsing import SECOND, START, Watched, field, shoot, tab, type_in
from tests.e2e.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EXAMPLE = TEMPLATES / "data" / "tidemark-support.jsonl"
TRAIN = 300 * SECOND
# A random answer ends when the model draws an end, which may be at once.
ATTEMPTS = 6
STOP = 20 * SECOND


def num_points(page: Page, chart: str) -> int:
    svg = page.locator(f"#{chart} svg")
    if svg.count() == 0:
        return 0
    found = re.search(r"(\d+) points", svg.first.get_attribute("aria-label") or "")
    return int(found.group(1)) if found else 0


def wait_points(page: Page, chart: str, more_than: int) -> int:
    for _ in range(TRAIN // 250):
        if (count := num_points(page, chart)) > more_than:
            return count
        page.wait_for_timeout(250)
    raise AssertionError(f"{chart} has {num_points(page, chart)} points, not more than {more_than}")


def wait_state(page: Page, state: str) -> None:
    expect(page.locator("#run-head .chip")).to_have_text(state, timeout=TRAIN)


def test_main_job_in_the_browser(browser: Browser, running: Running, tmp_path: Path) -> None:
    watched = Watched(browser, running)
    page = watched.page
    page.goto(running.url)
    expect(page.get_by_text("No dataset yet")).to_be_visible(timeout=START)
    refuses_a_bad_file(page, tmp_path)
    uploads(page)
    launches(page)
    follows_and_reloads(page, browser, running)
    stops(page)
    trains_to_the_end(page)
    merges(page)
    chats(page, running)
    assert watched.foreign == []
    assert watched.errors == []


def refuses_a_bad_file(page: Page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"messages": [{"role": "bot", "content": "<b>hi</b>"}]}) + "\n")
    page.locator("#upload input[type=file]").set_input_files(bad)
    answer = page.locator("#dataset-answer")
    expect(answer).to_contain_text("bad.jsonl was not stored: 1 error")
    expect(answer).to_contain_text("messages[0].role")
    expect(page.locator("#dataset-keep")).to_be_hidden()
    shoot(page, "datasets-refused")
    page.locator("#dataset-discard").click()
    expect(answer).not_to_contain_text("bad.jsonl")


def uploads(page: Page) -> None:
    page.locator("#upload input[type=file]").set_input_files(EXAMPLE)
    expect(page.locator("#dataset-answer")).to_contain_text("200 conversations")
    expect(page.locator("#dataset-report")).to_contain_text("Recognised as OpenAI messages")
    shoot(page, "datasets")
    tab(page, "Record by record")
    expect(page.locator("#dataset-preview")).to_contain_text("The warranty lasts 31 months.")
    page.locator("#dataset-forward").click()
    expect(page.locator("#dataset-preview")).to_contain_text("System message")
    shoot(page, "datasets-record")
    reads_as_the_model_does(page)


def reads_as_the_model_does(page: Page) -> None:
    tab(page, "As the model reads it")
    type_in(page, "dataset-find", "survive a winter")
    field(page, "dataset-find").press("Enter")
    expect(page.locator("#dataset-tokens .tokens .learned").first).to_be_visible()
    shoot(page, "inspector")
    tab(page, "In tokens")
    page.locator("#stats-count").click()
    expect(page.locator("#dataset-stats")).to_contain_text("200 conversations as tiny/qwen3.5")
    shoot(page, "tokens")


def launches(page: Page) -> None:
    tab(page, "Train")
    total = page.locator("#train-total")
    expect(total).to_contain_text("606,976")
    page.get_by_label(re.compile("Dense MLP")).uncheck()
    expect(total).to_contain_text("312,064")
    page.get_by_label(re.compile("Dense MLP")).check()
    expect(total).to_contain_text("606,976")
    page.get_by_label("Advanced", exact=True).check()
    type_in(page, "field-optim-learning_rate", "nan")
    expect(page.locator("#train-trouble")).to_contain_text("optim.learning_rate is")
    type_in(page, "field-optim-learning_rate", "5e-3")
    expect(page.locator("#train-trouble")).not_to_contain_text("learning_rate")
    type_in(page, "field-name", "A run with a <b>long</b> name " + "that goes on " * 6)
    shoot(page, "train-advanced")
    page.get_by_label("Simple", exact=True).check()
    # However busy the machine is, it still trains when it is stopped.
    type_in(page, "field-train-epochs", "100")
    shoot(page, "train")
    page.locator("#train-launch").click()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true")


def follows_and_reloads(page: Page, browser: Browser, running: Running) -> None:
    wait_state(page, "RUNNING")
    before = wait_points(page, "chart-loss", 1)
    wait_points(page, "chart-loss", before)  # the chart moves
    page.reload()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute(
        "aria-selected", "true", timeout=START
    )
    wait_points(page, "chart-loss", before)
    wait_points(page, "chart-learning-rate", before)
    wait_points(page, "chart-grad-norm", before)
    other = Watched(browser, running)
    other.page.goto(f"{running.url}/?tab=runs")
    wait_points(other.page, "chart-loss", before)
    other.page.context.close()
    expect(page.locator("#run-proofs")).to_contain_text("606,976 trainable parameters")
    shoot(page, "runs-live")


def stops(page: Page) -> None:
    page.locator("#run-stop").click()
    wait_state(page, "STOPPED")
    expect(page.locator("#run-stop")).to_be_disabled()


def trains_to_the_end(page: Page) -> None:
    tab(page, "Train")
    type_in(page, "field-train-epochs", "0.8")
    page.locator("#train-launch").click()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#run-head h3")).to_contain_text("2 · ")
    wait_state(page, "FINISHED")
    expect(page.locator("#run-proofs .stamp.bad")).to_have_count(0)
    page.get_by_role("button", name="Log").click()
    expect(field(page, "run-log")).not_to_have_value("")
    shoot(page, "runs")


def merges(page: Page) -> None:
    page.locator("#run-merge").click()
    expect(page.get_by_role("tab", name="Artifacts")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#artifact-pick input")).to_have_value(re.compile("run 2"))
    page.locator("#artifact-merge").click()
    card = page.locator("#artifact-list .card").first
    expect(card).to_have_attribute("data-state", "FINISHED", timeout=TRAIN)
    expect(card.locator(".seal")).to_contain_text("PASSED")
    shoot(page, "artifacts")
    page.go_back()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true")


def chats(page: Page, running: Running) -> None:
    tab(page, "Chat")
    expect(page.locator("#chat-pick input")).to_have_value(re.compile("merge 1"))
    ask(page, "How long is the Tidemark warranty?")
    for side in ("base", "tuned"):
        bot = page.locator(f"#chat-{side} .bot")
        expect(bot.first).not_to_be_empty(timeout=START)
    expect(page.locator("#chat-send")).to_be_enabled(timeout=START)
    shoot(page, "chat")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for Longest answer (tokens)").fill("2048")
    page.get_by_label("number input for Temperature").fill("2")
    stops_an_answer(page, running)


def stops_an_answer(page: Page, running: Running) -> None:
    """Press Stop while the models write; ask again when they were done before it was pressed."""
    for number in range(ATTEMPTS):
        ask(page, f"And the Mini, number {number}?")
        if is_written(page, running) and presses_stop(page):
            break
    else:
        raise AssertionError(f"Stop could not be pressed during any of {ATTEMPTS} answers")
    expect(page.locator("#chat-send")).to_be_enabled(timeout=STOP)
    expect(page.locator("#chat-stop")).to_be_disabled()
    for _ in range(STOP // 100):
        if not num_replies(running):
            return
        page.wait_for_timeout(100)
    raise AssertionError("the models write on after Stop")


def is_written(page: Page, running: Running) -> bool:
    """Wait until the models write; False when nothing was seen of it in ten seconds."""
    for _ in range(100):
        if num_replies(running):
            return True
        page.wait_for_timeout(100)
    return False


def presses_stop(page: Page) -> bool:
    """Press Stop; False when it could not be pressed, as it cannot when nothing is written."""
    try:
        page.locator("#chat-stop").click(timeout=STOP)
    except TimeoutError:
        return False
    return True


def num_replies(running: Running) -> int:
    """Ask the chat process how many answers it writes."""
    with sqlite3.connect(running.home.database) as connection:
        query = "SELECT port, token FROM chats ORDER BY id DESC LIMIT 1"
        port, token = connection.execute(query).fetchone()
    headers = {"Authorization": f"Bearer {token}"}
    url = f"http://127.0.0.1:{port}/healthz"
    answer = httpx.get(url, headers=headers, trust_env=False, timeout=30)
    return int(answer.json()["replies"])


def ask(page: Page, text: str) -> None:
    field(page, "chat-message").fill(text)
    page.locator("#chat-send").click()
