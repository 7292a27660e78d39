"""The guard in front of every route: own host, own origin, own content."""

import asyncio

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from studio.ui.guard import Guard

HOST = "127.0.0.1:7860"
ORIGIN = f"http://{HOST}"


async def behind(scope: Scope, receive: Receive, send: Send) -> None:
    """A page that answers everything."""
    await PlainTextResponse("reached")(scope, receive, send)


def ask(method: str = "GET", host: str = HOST, **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=Guard(behind))
        async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(method, "/", headers={"host": host, **named})

    return asyncio.run(send())


@pytest.mark.parametrize(
    "host",
    [HOST, "127.0.0.1", "localhost:7860", "localhost", "[::1]:7860", "[::1]"],
)
def test_names_of_this_machine_are_known(host: str) -> None:
    assert (ask(host=host).status_code, ask(host=host).text) == (200, "reached")


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:7860",
        "127.0.0.1.evil.example",
        "localhost.evil.example:7860",
        "0.0.0.0:7860",
        "::1",
        "[::1].evil.example",
        "127.0.0.1:7860@evil.example",
        "[::1]:7860]",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_foreign_host_is_refused(method: str, host: str) -> None:
    answer = ask(method, host=host)
    assert answer.status_code == 400
    assert "reached" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://127.0.0.1:7861",
        "http://127.0.0.1",
        "http://localhost:7860",
        "null",
        "",
        "http://[",
        f"http://{HOST}@evil.example",
        f"http://evil.example/{HOST}",
    ],
)
def test_a_change_from_another_origin_is_refused(method: str, origin: str) -> None:
    answer = ask(method, origin=origin)
    assert answer.status_code == 403
    assert "reached" not in answer.text


@pytest.mark.parametrize("host", [HOST, "localhost:7860", "[::1]:7860"])
def test_a_change_from_our_own_origin_passes(host: str) -> None:
    answer = ask("POST", host=host, origin=f"http://{host}", sec_fetch_site="same-origin")
    assert answer.text == "reached"


def test_a_change_from_a_program_that_is_no_browser_passes() -> None:
    assert ask("POST").text == "reached"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_the_browser_calls_foreign_is_refused_even_without_an_origin(site: str) -> None:
    assert ask("POST", sec_fetch_site=site).status_code == 403


def test_a_link_from_elsewhere_may_open_the_page() -> None:
    assert ask("GET", sec_fetch_site="cross-site").text == "reached"


def test_every_answer_keeps_the_page_from_loading_anything_from_elsewhere() -> None:
    headers = ask().headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"


def test_a_refusal_shows_the_host_as_plain_text() -> None:
    answer = ask(host="<script>alert(1)</script>")
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith("text/plain")


def test_what_is_no_request_goes_through() -> None:
    seen: list[str] = []

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        seen.append(scope["type"])

    async def receive() -> Message:
        return {}

    async def send(_: Message) -> None:
        return

    asyncio.run(Guard(lifespan)({"type": "lifespan"}, receive, send))
    assert seen == ["lifespan"]
