"""A browser as a person uses it: tabs, fields, and a watch on everything that goes wrong."""

from playwright.sync_api import Browser, Locator, Page, Request, expect

from tests.e2e.conftest import SCREENSHOTS, Running

SECOND = 1000
START = 120 * SECOND
# Longer than anything takes on two cores that others use, too: it costs only what is broken.
PATIENCE = 60 * SECOND
WIDTHS = (1440, 390)
# What follows from a new width is laid out in the next frame, and painted in the one after.
TWO_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
expect.set_options(timeout=PATIENCE)


class Watched:
    """A page, and everything that went wrong on it."""

    def __init__(self, browser: Browser, running: Running) -> None:
        context = browser.new_context(viewport={"width": 1440, "height": 1000})
        context.set_default_timeout(PATIENCE)
        self.page: Page = context.new_page()
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self._own = running.url
        self.page.on("request", self._request)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self._own, "data:", "blob:")):
            self.foreign.append(request.url)

    def _console(self, message: object) -> None:
        text = str(getattr(message, "text", message))
        if "Content Security Policy" in text:
            self.errors.append(text)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def field(page: Page, elem_id: str) -> Locator:
    return page.locator(f"#{elem_id} input, #{elem_id} textarea").first


def type_in(page: Page, elem_id: str, text: str) -> None:
    """Paste all but the last sign and press that: every key costs the page an answer.

    Gradio's text boxes hear keys, not the values that scripts set.
    """
    box = field(page, elem_id)
    box.click()
    box.press("ControlOrMeta+a")
    page.keyboard.insert_text(text[:-1])
    box.press_sequentially(text[-1])


def shoot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    size = page.viewport_size
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 1000})
        page.evaluate(TWO_FRAMES)
        page.wait_for_timeout(100)
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}.png", full_page=True)
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 1, f"{name} is {wide} px wider than a screen of {width} px"
    if size:
        page.set_viewport_size(size)
