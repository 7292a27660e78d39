"""Base and tuned model answer at the same time from one loaded model, over HTTP on loopback."""

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from studio.disk import Home, OrderFolder
from studio.domain.orders import ChatOrder

MODEL = "tiny/qwen3.5"
TOKEN = "a-token-for-this-test"
QUESTION = [{"role": "user", "content": "How often should I calibrate it?"}]


pytestmark = pytest.mark.usefixtures("one_thread")


class Server:
    """A chat process, and a client of it."""

    def __init__(self, folder: OrderFolder, process: subprocess.Popen[bytes]) -> None:
        self.folder, self.process = folder, process
        self.ready = json.loads(folder.ready.read_text())
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.ready['port']}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=60,
        )

    def ask(self, **values: Any) -> httpx.Response:
        """Ask the tuned model for a short greedy reply, or as `values` say."""
        body = {"model": "tuned", "messages": QUESTION, "temperature": 0, "max_tokens": 16}
        return self.client.post("/v1/chat/completions", json={**body, **values})

    def stream(self, **values: Any) -> Iterator[dict[str, Any]]:
        """Ask the same, and yield the chunks of the reply."""
        body = {"model": "tuned", "messages": QUESTION, "temperature": 0, "max_tokens": 16}
        body |= {**values, "stream": True}
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        yield from (json.loads(line.removeprefix("data: ")) for line in lines[:-1])

    def replies_under_way(self) -> int:
        """Return how many replies the process is writing."""
        return int(self.client.get("/healthz").json()["replies"])


def _start(folder: OrderFolder, **values: Any) -> subprocess.Popen[bytes]:
    folder.path.mkdir(parents=True)
    order = ChatOrder.model_validate({"token": TOKEN, "method": "qlora", **values})
    folder.order.write_text(order.model_dump_json(), encoding="utf-8")
    with folder.log.open("wb") as log:
        return subprocess.Popen(
            ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "workers.chat", str(folder.path)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _until(holds: Callable[[], bool], *, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(models_home: Home, adapter_of: Callable[[str], Path]) -> Iterator[Server]:
    adapter = adapter_of(MODEL)
    folder = models_home.chat(1)
    process = _start(folder, model={"id": MODEL}, adapter=str(adapter), run_id=1, method="qlora")
    try:
        _until(folder.ready.exists, seconds=60, log=folder.log)
        server = Server(folder, process)
        yield server
        server.client.close()
    finally:
        process.kill()
        process.wait()


def test_both_models_are_listed_and_answer_differently(server: Server) -> None:
    assert server.ready["pid"] == server.process.pid
    assert server.ready["models"] == ["base", "tuned"]
    models = server.client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["base", "tuned"]
    base, tuned = (server.ask(model=name).json() for name in ("base", "tuned"))

    assert base["object"] == "chat.completion"
    assert base["choices"][0]["message"]["role"] == "assistant"
    assert base["choices"][0]["message"]["content"]
    assert base["choices"][0]["message"] != tuned["choices"][0]["message"]
    assert tuned["model"] == "tuned"


def test_a_stream_ends_with_usage_and_is_the_whole_reply_in_pieces(server: Server) -> None:
    whole = server.ask().json()
    chunks = list(server.stream())
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]

    assert deltas[0] == {"role": "assistant", "content": ""}
    assert (
        "".join(d.get("content", "") for d in deltas) == whole["choices"][0]["message"]["content"]
    )
    assert len([delta for delta in deltas if delta.get("content")]) > 3
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 16
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_seed_stop_and_thinking_are_obeyed(server: Server) -> None:
    def content(**values: Any) -> str:
        return str(server.ask(**values).json()["choices"][0]["message"]["content"])

    drawn = content(temperature=1.5, seed=5)
    assert drawn == content(temperature=1.5, seed=5) != content(temperature=1.5, seed=6)
    whole = content()
    stop = whole[4:7]
    cut = server.ask(stop=stop).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    thought = server.ask(chat_template_kwargs={"enable_thinking": True}).json()
    assert thought["choices"][0]["message"]["reasoning_content"]
    assert thought["choices"][0]["message"]["content"] == ""


def test_replies_at_the_same_time_equal_replies_one_after_another(server: Server) -> None:
    alone = {name: _text(list(server.stream(model=name))) for name in ("base", "tuned")}
    together: dict[str, str] = {}
    times: dict[str, tuple[float, float]] = {}

    def ask(name: str) -> None:
        start = time.monotonic()
        together[name] = _text(list(server.stream(model=name)))
        times[name] = (start, time.monotonic())

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("base", "tuned")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert together == alone
    assert times["base"][0] < times["tuned"][1]
    assert times["tuned"][0] < times["base"][1]


def _text(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_a_client_that_leaves_a_stream_frees_the_model(server: Server) -> None:
    body = {"model": "base", "messages": QUESTION, "temperature": 0, "max_tokens": 3000}
    body["stream"] = True
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        assert len(list(itertools.islice(lines, 3))) == 3
        assert server.replies_under_way() == 1
    _until(lambda: server.replies_under_way() == 0, seconds=2, log=server.folder.log)
    assert server.ask(max_tokens=2).status_code == 200


def test_a_client_that_waits_no_longer_frees_the_model(server: Server) -> None:
    body = {"model": "base", "messages": QUESTION, "temperature": 0, "max_tokens": 3000}
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/chat/completions", json=body, timeout=0.5)
    _until(lambda: server.replies_under_way() == 0, seconds=2, log=server.folder.log)
    assert server.ask(max_tokens=2).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/v1/chat/completions", "/nowhere"])
def test_a_wrong_token_is_refused_everywhere(server: Server, path: str) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        response = httpx.post(server.client.base_url.join(path), headers=header)
        assert response.status_code == 401
        assert response.json()["error"]["message"].endswith("missing or wrong.")


@pytest.mark.parametrize(
    ("values", "status", "said"),
    [
        ({"temprature": 1}, 422, "temprature is not a field that this server knows."),
        ({"temperature": 3}, 422, "temperature: input should be less than or equal to 2."),
        ({"temperature": "1"}, 422, "temperature: input should be a valid number."),
        ({"n": 2}, 422, "n: input should be 1."),
        ({"stop": ["a"] * 5}, 422, "stop: at most 4 stop sequences are taken"),
        ({"chat_template_kwargs": {"x": 1}}, 422, "chat_template_kwargs.x is not a field"),
        ({"model": "gpt"}, 404, "There is no model 'gpt' here. Choose one of: base, tuned."),
        ({"messages": [{"role": "robot", "content": ""}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "chat template refuses"),
        ({"messages": [{"role": "user", "content": "tide " * 5000}]}, 400, "the context of the"),
    ],
)
def test_a_wrong_request_is_refused_with_a_sentence(
    server: Server, values: dict[str, Any], status: int, said: str
) -> None:
    response = server.ask(**values)
    error = response.json()["error"]

    assert response.status_code == status
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in response.text


def test_standard_fields_that_change_nothing_are_taken(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "get_tide", "parameters": {}}}]
    usual = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "user": "me", "stop": None}
    with_tools = server.ask(**usual, tools=tools).json()

    assert with_tools["usage"]["prompt_tokens"] > 2 * server.ask().json()["usage"]["prompt_tokens"]
    unknown = server.client.get("/v1/unknown")
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (404, "Not Found")
    broken = server.client.post("/v1/chat/completions", content=b"{")
    assert broken.status_code == 422
    assert broken.json()["error"]["message"]


def test_a_reply_ends_where_the_context_is_full(server: Server) -> None:
    def used(words: int, most: int = 1) -> dict[str, int]:
        question = [{"role": "user", "content": "tide " * words}]
        usage: dict[str, int] = server.ask(messages=question, max_tokens=most).json()["usage"]
        return usage

    few, more = (used(words)["prompt_tokens"] for words in (10, 20))
    nearly_all = used(10 * (4096 - few - 20) // (more - few), most=500)
    assert nearly_all["total_tokens"] == 4096
    assert nearly_all["completion_tokens"] < 100


def test_sigterm_ends_the_process_within_two_seconds_even_while_it_answers(server: Server) -> None:
    said: list[str] = []
    thread = threading.Thread(
        target=lambda: said.append(server.ask(max_tokens=3000).json()["error"]["message"])
    )
    thread.start()
    _until(lambda: server.replies_under_way() == 1, seconds=5, log=server.folder.log)
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(timeout=10)

    assert time.monotonic() - start < 2
    assert not server.folder.ready.exists()
    thread.join(timeout=5)
    assert said == ["The Chat was closed while it answered. Open it again."]
