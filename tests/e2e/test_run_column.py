"""A run in a real browser: save and evaluate now, pause, resume, stop, fork, clone, the queue."""

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from studio.services import datasets
from studio.services.studio import open_studio
from studio.settings import Settings
from tests.e2e.browsing import SECOND, START, Watched, field, shoot, tab, type_in
from tests.e2e.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TRAIN = 300 * SECOND
FORKED_RATE = "7e-4"


def test_the_run_column_in_the_browser(browser: Browser, running: Running) -> None:
    datasets.import_example(open_studio(Settings(home=running.home.path)))
    watched = Watched(browser, running)
    page = watched.page
    page.goto(f"{running.url}/?tab=queue")
    expect(page.locator("#queue-head")).to_contain_text("No run waits", timeout=START)
    expect(page.locator("#queue-workers")).to_contain_text("waits for work", timeout=START)
    launches(page)
    saves_and_evaluates(page)
    pauses_and_resumes(page)
    forks(page, browser, running)
    queues(page, browser, running)
    stops(page)
    assert watched.foreign == []
    assert watched.errors == []


def wait_state(page: Page, state: str) -> None:
    expect(page.locator("#run-head .chip")).to_have_text(state, timeout=TRAIN)


def wait_steps(page: Page) -> None:
    """Wait until the run has taken a step."""
    expect(page.locator("#run-head .under")).to_contain_text(
        re.compile(r"step [1-9]\d* of"), timeout=TRAIN
    )


def unfold(page: Page, elem_id: str) -> None:
    button = page.locator(f"#{elem_id} button").first
    if "open" not in (button.get_attribute("class") or "").split():
        button.click()


def shoot_dark(browser: Browser, running: Running, address: str, name: str) -> None:
    """Take the pictures of a page as those see it who prefer the dark."""
    dark = Watched(browser, running)
    dark.page.emulate_media(color_scheme="dark")
    dark.page.goto(f"{running.url}/{address}")
    seen = "#queue-workers .card" if "queue" in address else "#run-head h3"
    expect(dark.page.locator(seen).first).to_be_visible(timeout=START)
    shoot(dark.page, f"{name}-dark")
    assert dark.errors == []
    dark.page.context.close()


def launches(page: Page) -> None:
    tab(page, "Train")
    page.get_by_label("Advanced", exact=True).check()
    type_in(page, "field-name", "first")
    page.get_by_role("button", name=re.compile("^Data")).click()
    type_in(page, "field-data-eval_share", "0.1")
    type_in(page, "field-train-epochs", "200")
    expect(page.locator("#train-trouble")).to_be_empty()
    page.locator("#train-launch").click()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true")
    wait_state(page, "RUNNING")
    wait_steps(page)


def saves_and_evaluates(page: Page) -> None:
    page.locator("#run-save").click()
    expect(page.locator("#run-checkpoints button").first).to_contain_text(
        "Checkpoints · 1", timeout=TRAIN
    )
    page.locator("#run-evaluate").click()
    unfold(page, "run-happened")
    history = page.locator("#run-history")
    expect(history).to_contain_text("You launched it.")
    expect(history).to_contain_text("You asked for a checkpoint.")
    expect(history).to_contain_text(re.compile("Checkpoint of step .* saved"))
    expect(history).to_contain_text("You asked for an evaluation.")


def pauses_and_resumes(page: Page) -> None:
    page.locator("#run-pause").click()
    wait_state(page, "PAUSED")
    expect(page.locator("#run-head")).to_contain_text("paused by you")
    expect(page.locator("#run-pick")).to_contain_text("paused")
    expect(page.locator("#run-save")).to_be_disabled()
    shoot(page, "run-paused")
    page.locator("#run-resume").click()
    wait_state(page, "RUNNING")
    expect(page.locator("#run-history")).to_contain_text(
        re.compile("Goes on from its Checkpoint of step"), timeout=TRAIN
    )
    page.locator("#run-stop").click()
    wait_state(page, "STOPPED")
    expect(page.locator("#run-history")).to_contain_text("You asked it to stop.")


def forks(page: Page, browser: Browser, running: Running) -> None:
    page.locator("#run-fork").click()
    steps = page.locator("#run-step label")
    expect(steps.first).to_be_visible()
    steps.first.click()
    shoot(page, "run-checkpoints")
    page.locator("#run-fork-here").click()
    expect(page.get_by_role("tab", name="Train")).to_have_attribute("aria-selected", "true")
    box = page.locator("#train-origin")
    expect(box).to_contain_text(re.compile("Fork of run 1 from step"))
    expect(box).to_contain_text("weights, optimizer and data order go on")
    expect(box).to_contain_text("Nothing is different yet.")
    expect(field(page, "field-name")).to_have_value("first")
    type_in(page, "field-optim-learning_rate", FORKED_RATE)
    expect(box.locator(".diff")).to_contain_text("Learning rate")
    expect(box.locator(".diff ins")).to_have_text("0.0007")
    type_in(page, "field-lora-rank", "3")
    expect(box).to_contain_text("A fork cannot change what its checkpoint is made of")
    shoot(page, "train-fork-refused")
    type_in(page, "field-lora-rank", "32")
    expect(box.locator(".diff tr")).to_have_count(2)
    type_in(page, "field-name", "second")
    expect(box.locator(".diff tr")).to_have_count(3)
    shoot(page, "train-fork")
    page.locator("#train-launch").click()
    expect(page.locator("#run-head h3")).to_contain_text("2 · second")
    expect(page.locator("#run-head .lineage")).to_contain_text("Forked from run 1 at step")
    wait_state(page, "RUNNING")
    unfold(page, "run-happened")
    expect(page.locator("#run-history")).to_contain_text(
        re.compile(r"Goes on from step \d+ of run 1"), timeout=TRAIN
    )
    wait_steps(page)
    shoot(page, "run-forked")
    shoot_dark(browser, running, "?tab=runs&run=2", "run-forked")
    page.locator("#run-pick label").nth(1).click()
    expect(page.locator("#run-head .lineage")).to_contain_text("Forked from it: run 2")


def queues(page: Page, browser: Browser, running: Running) -> None:
    for number, name in ((3, "third"), (4, "fourth")):
        page.locator("#run-clone").click()
        expect(page.get_by_role("tab", name="Train")).to_have_attribute("aria-selected", "true")
        expect(page.locator("#train-origin")).to_contain_text(re.compile(r"Clone of run \d"))
        type_in(page, "field-name", name)
        expect(page.locator("#train-origin .diff ins").first).to_have_text(name)
        page.locator("#train-launch").click()
        expect(page.locator("#run-head h3")).to_contain_text(f"{number} · {name}")
        expect(page.locator("#run-head .chip")).to_have_text("QUEUED")
    expect(page.locator("#run-head")).to_contain_text("its turn comes after run 3")
    tab(page, "Queue")
    lines = page.locator("#queue-pick label")
    expect(lines.nth(0)).to_contain_text("run 3 · third")
    expect(lines.nth(0)).to_contain_text("Next: starts as soon as a worker is free")
    expect(page.locator("#queue-workers")).to_contain_text("trains run 2")
    lines.nth(1).click()
    page.locator("#queue-first").click()
    expect(lines.nth(0)).to_contain_text("run 4 · fourth")
    page.locator("#queue-down").click()
    expect(lines.nth(0)).to_contain_text("run 3 · third")
    waits(page)
    shoot(page, "queue")
    shoot_dark(browser, running, "?tab=queue", "queue")
    page.locator("#queue-pause").click()
    expect(page.locator("#queue-head")).to_contain_text("no run is started")
    expect(lines.nth(0)).to_contain_text("the queue is paused")
    shoot(page, "queue-paused")
    page.locator("#queue-resume").click()
    expect(page.locator("#queue-head")).not_to_contain_text("no run is started")


def waits(page: Page) -> None:
    """Say of the fourth run when it starts."""
    lines = page.locator("#queue-pick label")
    unfold(page, "queue-when")
    expect(field(page, "queue-priority")).to_have_value("0")
    type_in(page, "queue-moment", "soon")
    page.locator("#queue-use").click()
    expect(page.get_by_text("'soon' is no time.")).to_be_visible()
    type_in(page, "queue-moment", "+8h")
    page.locator("#queue-use").click()
    expect(lines.nth(1)).to_contain_text("starts at ")
    type_in(page, "queue-before", "1")
    page.locator("#queue-use").click()
    expect(lines.nth(1)).to_contain_text("waits for run 1, which was stopped")
    page.locator("#queue-alone").click()
    expect(lines.nth(1)).to_contain_text("starts at ")
    expect(field(page, "queue-before")).to_have_value("")
    expect(field(page, "queue-moment")).to_have_value(re.compile(r"^\d{4}-\d\d-\d\d "))
    page.locator("#queue-hold").click()
    expect(lines.nth(1)).to_contain_text("paused by you")


def stops(page: Page) -> None:
    """Stop what waits and what trains."""
    lines = page.locator("#queue-pick label")
    for left in (1, 0):
        page.locator("#queue-stop").click()
        expect(lines).to_have_count(left)
    tab(page, "Runs")
    page.locator("#run-pick label", has_text="second").click()
    wait_state(page, "RUNNING")
    page.locator("#run-stop").click()
    wait_state(page, "STOPPED")
