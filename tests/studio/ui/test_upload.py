"""Uploads over HTTP: tus 1.0, refused from elsewhere, resumed; and the box in a real browser."""

import base64
import hashlib
import json
import random
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI
from playwright.sync_api import Page, expect, sync_playwright

from studio.services import uploads
from studio.services.studio import Studio
from studio.ui import look, upload_routes
from studio.ui.guard import Guard
from studio.ui.upload import upload_box
from studio.ui.upload_routes import mount_uploads
from tests.fakes import make_studio
from tests.serving import serve

BODY = {"Content-Type": "application/offset+octet-stream"}
ODD_NAME = "\u05e9\u05dc\u05d5\u05dd \U0001f600 '; rm -rf <b>.jsonl"


@pytest.fixture
def base(studio: Studio) -> Iterator[str]:
    """The routes behind the guard."""
    app = FastAPI()
    mount_uploads(app, studio)
    yield from serve(Guard(app))


@pytest.fixture
def client(base: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base, timeout=20) as client:
        yield client


def metadata(name: str) -> str:
    return f"filename {base64.b64encode(name.encode()).decode()}"


def create(client: httpx.Client, size: int, name: str = "x.jsonl") -> str:
    headers = {"Upload-Length": str(size), "Upload-Metadata": metadata(name)}
    answer = client.post("/uploads", headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.headers["tus-resumable"] == "1.0.0"
    return str(answer.headers["location"])


def patch(
    client: httpx.Client, place: str, offset: int, body: bytes, **more: str
) -> httpx.Response:
    headers = BODY | {"Upload-Offset": str(offset), "Tus-Resumable": "1.0.0"} | more
    return client.patch(place, content=body, headers=headers)


# ---- the protocol -----------------------------------------------------------------------------


def test_a_file_arrives_in_pieces_with_its_name_and_hash(
    client: httpx.Client, studio: Studio
) -> None:
    content = random.Random(0).randbytes(9_000_000)
    place = create(client, len(content), ODD_NAME)
    for start in range(0, len(content), 5_000_000):
        answer = patch(client, place, start, content[start : start + 5_000_000])
        assert answer.status_code == 204
    head = client.head(place)
    digest = hashlib.sha256(content).hexdigest()
    assert answer.headers["upload-sha256"] == head.headers["upload-sha256"] == digest
    assert head.headers["upload-offset"] == head.headers["upload-length"] == str(len(content))
    assert head.headers["cache-control"] == "no-store"
    (found,) = uploads.finished(studio, json.dumps([place.rpartition("/")[2]]))
    assert (found.name, found.path.read_bytes()) == (ODD_NAME, content)


def test_the_server_says_what_it_speaks(client: httpx.Client, studio: Studio) -> None:
    headers = client.options("/uploads").headers
    assert headers["tus-version"] == "1.0.0"
    assert headers["tus-extension"] == "creation,termination"
    assert headers["tus-max-size"] == str(studio.settings.max_upload_bytes)


def test_another_version_of_the_protocol_is_refused(client: httpx.Client) -> None:
    answer = client.post("/uploads", headers={"Tus-Resumable": "0.2.2", "Upload-Length": "1"})
    assert (answer.status_code, answer.headers["tus-version"]) == (412, "1.0.0")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
    ],
)
def test_another_site_can_neither_begin_nor_change_nor_delete(
    client: httpx.Client, studio: Studio, headers: dict[str, str]
) -> None:
    place = create(client, 3)
    assert patch(client, place, 0, b"abc", **headers).status_code in (400, 403)
    assert client.delete(place, headers=headers).status_code in (400, 403)
    begin = headers | {"Upload-Length": "1", "Upload-Metadata": metadata("x")}
    assert client.post("/uploads", headers=begin).status_code in (400, 403)
    assert client.head(place).headers["upload-offset"] == "0"
    assert len(list(studio.home.incoming.iterdir())) == 1


@pytest.mark.parametrize("length", ["", "x", "-1", "1.5", "\u00b2", "9" * 30])
def test_a_length_that_is_no_number_is_refused_in_words(client: httpx.Client, length: str) -> None:
    headers = {b"Upload-Length": length.encode("latin-1"), b"Upload-Metadata": b"filename eA=="}
    answer = client.post("/uploads", headers=headers)
    assert answer.status_code == 400
    assert "not a number of bytes" in answer.json()["message"]


@pytest.mark.parametrize("text", ["", "filename", "filename !!!", "filename /w==", "filetype eA=="])
def test_a_name_that_cannot_be_read_is_refused_in_words(client: httpx.Client, text: str) -> None:
    answer = client.post("/uploads", headers={"Upload-Length": "1", "Upload-Metadata": text})
    assert answer.status_code == (201 if text == "filename" else 400)
    if text != "filename":
        assert "name" in answer.json()["message"]


def test_a_file_that_is_too_large_is_refused_before_it_is_sent(
    client: httpx.Client, studio: Studio
) -> None:
    size = studio.settings.max_upload_bytes + 1
    headers = {"Upload-Length": str(size), "Upload-Metadata": metadata("x")}
    answer = client.post("/uploads", headers=headers)
    assert answer.status_code == 413
    assert "STUDIO_MAX_UPLOAD_BYTES" in answer.json()["hint"]


def test_more_than_was_announced_is_refused(client: httpx.Client) -> None:
    place = create(client, 3)
    assert patch(client, place, 0, b"abcd").status_code == 413
    assert client.head(place).headers["upload-offset"] == "0"
    assert patch(client, place, 0, b"abc").status_code == 204


def test_a_wrong_offset_is_a_conflict(client: httpx.Client) -> None:
    place = create(client, 3)
    answer = patch(client, place, 1, b"bc")
    assert answer.status_code == 409
    assert "come to byte 0" in answer.json()["message"]


def test_only_bytes_are_taken(client: httpx.Client) -> None:
    place = create(client, 3)
    assert patch(client, place, 0, b"abc", **{"Content-Type": "text/plain"}).status_code == 415


def test_a_deleted_upload_is_gone_and_none_is_handed_out(
    client: httpx.Client, studio: Studio
) -> None:
    place = create(client, 3)
    assert client.get(place).status_code == 405
    assert client.delete(place).status_code == 204
    assert client.head(place).status_code == 404
    assert patch(client, place, 0, b"abc").status_code == 404
    assert list(studio.home.incoming.iterdir()) == []


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fstudio.db", "0" * 32])
def test_only_ids_that_were_given_name_an_upload(client: httpx.Client, name: str) -> None:
    assert client.delete(f"/uploads/{name}").status_code in (404, 405)


# ---- broken lines -----------------------------------------------------------------------------


def half_sent(base: str, place: str, body: bytes, announced: int) -> socket.socket:
    """Begin a PATCH on a socket of its own, and leave it hanging."""
    port = int(base.rpartition(":")[2])
    line = socket.create_connection(("127.0.0.1", port))
    line.sendall(
        f"PATCH {place} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpload-Offset: 0\r\n"
        f"Content-Type: {BODY['Content-Type']}\r\nContent-Length: {announced}\r\n\r\n".encode()
        + body
    )
    return line


def until_offset(client: httpx.Client, place: str, offset: int) -> None:
    ends = time.monotonic() + 10
    while client.head(place).headers["upload-offset"] != str(offset):
        assert time.monotonic() < ends, "the bytes never arrived"
        time.sleep(0.02)


def test_what_came_before_the_line_broke_is_kept(client: httpx.Client, base: str) -> None:
    content = random.Random(1).randbytes(6_000_000)
    place = create(client, len(content))
    half_sent(base, place, content[:4_500_000], len(content)).close()
    until_offset(client, place, 4_500_000)
    answer = patch(client, place, 4_500_000, content[4_500_000:])
    assert answer.headers["upload-sha256"] == hashlib.sha256(content).hexdigest()


def test_a_silent_browser_loses_its_turn(
    client: httpx.Client, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_routes, "IDLE_SECONDS", 0.5)
    place = create(client, 6)
    with half_sent(base, place, b"abc", 6):
        time.sleep(0.1)
        assert patch(client, place, 0, b"abcdef").status_code == 409
        until_offset(client, place, 3)
        assert patch(client, place, 3, b"def").headers["upload-sha256"]


# ---- the box ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page with an upload box that lists what it was given."""
    studio = make_studio(tmp_path_factory.mktemp("box") / "home")
    app = FastAPI()
    mount_uploads(app, studio)

    def listed(text: str) -> str:
        found = uploads.finished(studio, text)
        return "; ".join(f"{each.name}={each.sha256}" for each in found)

    with gr.Blocks(analytics_enabled=False) as blocks:
        _, ids = upload_box()
        given = gr.Textbox(elem_id="given")
        ids.change(listed, ids, given)
    gr.mount_gradio_app(app, blocks, path="", css=look.css(), head=look.head(), ssr_mode=False)
    yield from serve(Guard(app))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, page_address: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(page_address)
    page.wait_for_selector(".dropzone")
    yield page
    context.close()
    assert faults == []


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_chosen_files_arrive_once_with_their_names(page: Page, tmp_path: Path) -> None:
    first, second = tmp_path / ODD_NAME, tmp_path / "b.jsonl"
    first.write_bytes(random.Random(2).randbytes(9_000_000))
    second.write_bytes(b"{}\n")
    page.set_input_files(".uploads input", [first, second])
    given = page.locator("#given textarea")
    expect(given).to_have_value(f"{ODD_NAME}={digest(first)}; b.jsonl={digest(second)}")
    expect(page.locator(".upload.done")).to_have_count(2)
    expect(page.get_by_text(digest(first))).to_be_visible()
    expect(page.locator(".uploadsay")).to_have_text("b.jsonl has arrived.")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_input_files(".uploads input", [second])
    expect(given).to_have_value(f"b.jsonl={digest(second)}")
    expect(page.locator(".upload")).to_have_count(1)


@pytest.mark.slow
def test_an_upload_is_paused_and_goes_on_after_a_reload(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    file.write_bytes(random.Random(3).randbytes(30_000_000))
    line = page.context.new_cdp_session(page)
    line.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 8e6}
    line.send("Network.emulateNetworkConditions", slow)
    page.set_input_files(".uploads input", [file])
    expect(page.locator(".uploadtext")).to_contain_text("/s")
    page.get_by_role("button", name="Pause large.jsonl").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".uploadtext")).to_contain_text("paused")
    page.reload()
    line.send("Network.emulateNetworkConditions", slow | {"uploadThroughput": -1})
    page.set_input_files(".uploads input", [file])
    expect(page.locator(".uploadsay")).to_have_text(
        re.compile(r"large.jsonl .*went on at [1-9]\d? %")
    )
    expect(page.locator("#given textarea")).to_have_value(f"large.jsonl={digest(file)}")


@pytest.mark.slow
def test_a_broken_line_is_tried_again(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(random.Random(4).randbytes(9_000_000))
    broken = iter([True, False, True, True])

    def unreliable(route: Any) -> None:
        if route.request.method == "PATCH" and next(broken, False):
            route.abort("connectionreset")
        else:
            route.continue_()

    page.route("**/uploads/**", unreliable)
    page.set_input_files(".uploads input", [file])
    expect(page.locator(".uploadtext")).to_contain_text("Trying again in")
    expect(page.locator("#given textarea")).to_have_value(f"c.jsonl={digest(file)}", timeout=20_000)


@pytest.mark.slow
def test_what_the_studio_refuses_is_said_and_what_is_cancelled_is_deleted(
    page: Page, tmp_path: Path
) -> None:
    file = tmp_path / "empty.jsonl"
    file.touch()
    page.set_input_files(".uploads input", [file])
    expect(page.locator(".upload.failed")).to_contain_text("The file is empty.")
    expect(page.get_by_role("button", name="Try again empty.jsonl")).to_have_count(0)
    page.get_by_role("button", name="Hide empty.jsonl").click()
    expect(page.locator(".upload")).to_have_count(0)
    expect(page.locator(".uploadsay")).to_have_text("")
    large = tmp_path / "large.jsonl"
    large.write_bytes(random.Random(5).randbytes(30_000_000))
    with page.expect_response(lambda answer: answer.request.method == "PATCH"):
        page.set_input_files(".uploads input", [large])
    with page.expect_response(lambda answer: answer.request.method == "DELETE") as deleted:
        page.get_by_role("button", name="Cancel large.jsonl").click()
    assert deleted.value.status == 204
    assert httpx.head(deleted.value.url).status_code == 404


@pytest.mark.slow
def test_what_is_over_leaves_the_list_when_more_is_chosen(page: Page, tmp_path: Path) -> None:
    empty, good, more = (tmp_path / name for name in ("empty.jsonl", "good.jsonl", "more.jsonl"))
    empty.touch()
    good.write_bytes(b"{}\n")
    more.write_bytes(b"[]\n")
    page.set_input_files(".uploads input", [empty, good])
    expect(page.locator(".upload.failed")).to_contain_text("The file is empty.")
    expect(page.locator("#given textarea")).to_have_value(f"good.jsonl={digest(good)}")
    page.set_input_files(".uploads input", [more])
    expect(page.locator("#given textarea")).to_have_value(f"more.jsonl={digest(more)}")
    expect(page.locator(".upload bdi")).to_have_text(["more.jsonl"])


@pytest.mark.slow
def test_a_fault_that_may_pass_stays_and_is_tried_again(page: Page, tmp_path: Path) -> None:
    file, other = tmp_path / "full.jsonl", tmp_path / "other.jsonl"
    file.write_bytes(b"{}\n")
    other.write_bytes(b"[]\n")
    full = json.dumps({"message": "The disk is full.", "hint": ""})
    page.route("**/uploads", lambda route: route.fulfill(status=507, body=full))
    page.set_input_files(".uploads input", [file])
    expect(page.locator(".upload.failed")).to_contain_text("The disk is full.")
    page.unroute("**/uploads")
    page.set_input_files(".uploads input", [other])
    expect(page.locator("#given textarea")).to_have_value(f"other.jsonl={digest(other)}")
    page.get_by_role("button", name="Try again full.jsonl").click()
    expect(page.locator("#given textarea")).to_have_value(f"full.jsonl={digest(file)}")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_a_long_name_stays_inside_its_card(page: Page, tmp_path: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    file = tmp_path / ("x" * 200 + ".jsonl")
    file.write_bytes(b"{}\n")
    page.set_input_files(".uploads input", [file])
    expect(page.locator(".uploadsay")).to_contain_text("has arrived")
    wide = """[...document.querySelectorAll('.uploads, .uploads *')].filter((node) =>
      node.scrollWidth > node.clientWidth && getComputedStyle(node).overflowX === 'visible'
      && getComputedStyle(node).display !== 'inline').map((node) => node.className)"""
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_name_cannot_turn_the_rest_of_its_line(page: Page, tmp_path: Path) -> None:
    name, spoken = "a\u202elnosj\u2066\x07.txt", "a\ufffdlnosj\ufffd\ufffd.txt"
    file = tmp_path / name
    file.write_bytes(b"{}\n")
    page.set_input_files(".uploads input", [file])
    expect(page.locator(".uploadsay")).to_have_text(f"{spoken} has arrived.")
    assert page.locator(".upload b > bdi").text_content() == name
    expect(page.locator(".meter")).to_have_attribute("aria-label", spoken)
    expect(page.get_by_role("button", name=f"Hide {spoken}")).to_be_visible()


@pytest.mark.slow
def test_a_long_list_scrolls_and_the_keyboard_reaches_it(page: Page, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.jsonl" for number in range(8)]
    for file in files:
        file.write_text(f"[{file.name!r}]\n", encoding="utf-8")
    page.set_input_files(".uploads input", files[:1])
    expect(page.locator(".upload.done button:visible")).to_have_count(1)
    uploads_list = page.get_by_role("list", name="Uploads")
    expect(uploads_list).to_have_attribute("tabindex", "-1")
    page.set_input_files(".uploads input", files)
    expect(page.locator(".upload.done")).to_have_count(8)
    box = uploads_list.bounding_box()
    assert box is not None
    assert box["height"] <= 260
    expect(page.locator(".upload").last).to_be_in_viewport()
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    page.set_input_files(".uploads input", [empty, *files])
    expect(page.locator(".upload.done")).to_have_count(8)
    expect(page.locator(".upload.failed")).to_be_in_viewport()
    page.locator(".uploads input").focus()
    page.keyboard.press("Tab")
    expect(uploads_list).to_be_focused()
    page.keyboard.press("End")
    expect(page.locator(".upload").last).to_be_in_viewport()
