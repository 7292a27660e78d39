"""Those who watch while Runs are trained: how late they see a point, and how long they wait.

Short forms read through the verbs that the page calls. The long one is a real page in a process of
its own, and browsers without a screen: each asks over HTTP for what the Runs tab asks at each tick.
"""

import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

from studio.domain.metrics import EVAL_LOSS, GRAD_NORM, LEARNING_RATE, LOSS
from studio.services import run_files, runs
from studio.services.studio import Studio
from studio.store.rows import PointRow
from tests.servers import free_port
from tests.soak.trainer import since_start

CURVES = (LOSS, EVAL_LOSS, LEARNING_RATE, GRAD_NORM)
PAGE_SECONDS = 1.5  # between two ticks of the Runs tab
EYE_SECONDS = 0.05
START_SECONDS = 120.0


class Follower(threading.Thread):
    """Whoever does something again and again until it is told to stop.

    Args:
        act: What it does.
        every_seconds: How often.
    """

    def __init__(self, act: Callable[[], None], every_seconds: float) -> None:
        super().__init__(daemon=True)
        self._act, self._every = act, every_seconds
        self._is_over = threading.Event()
        self.seconds: list[float] = []
        self.faults: list[str] = []

    def run(self) -> None:
        """Act; note how long each time took, and what went wrong."""
        while not self._is_over.is_set():
            began = time.monotonic()
            try:
                self._act()
            except Exception as error:
                self.faults.append(f"{type(error).__name__}: {error}")
                raise
            took = time.monotonic() - began
            self.seconds.append(took)
            self._is_over.wait(max(0.0, self._every - took))

    def stop(self) -> None:
        """End, after what is being done."""
        self._is_over.set()
        self.join()


class Eye:
    """Looks into the store for points that are new, and notes how old each is by then.

    Args:
        studio: The installation.
        run_ids: The Runs.
    """

    def __init__(self, studio: Studio, run_ids: Sequence[int]) -> None:
        self._studio = studio
        self._seen = dict.fromkeys(run_ids, 0)
        self.lags: list[float] = []

    def look(self) -> None:
        """Look once."""
        for run_id, seen in self._seen.items():
            new = select(PointRow.step, PointRow.value).where(
                PointRow.run_id == run_id, PointRow.name == "written_at", PointRow.step > seen
            )
            with self._studio.database.read() as session:
                found = session.execute(new).all()
            now = since_start()
            self.lags += [now - written_at for _, written_at in found]
            self._seen[run_id] = max([seen, *[step for step, _ in found]])


def read_as_the_page(studio: Studio, run_id: int) -> None:
    """Read what the Runs tab reads at each tick."""
    runs.listing(studio)
    runs.progress(studio, runs.get(studio, run_id))
    runs.curves(studio, run_id, CURVES)
    runs.history(studio, run_id)
    run_files.proofs(studio, run_id)
    run_files.log_tail(studio, run_id)


class Browser:
    """One session of the page: it stays on the Runs tab, with one Run chosen.

    Args:
        url: Of the page.
        run_id: The Run.
    """

    def __init__(self, url: str, run_id: int) -> None:
        self._client = httpx.Client(base_url=f"{url}/gradio_api", trust_env=False, timeout=60)
        self._session = uuid.uuid4().hex
        config = httpx.get(f"{url}/config", trust_env=False, timeout=60).json()
        kinds = {part["id"]: part["type"] for part in config["components"]}
        [pick] = [
            part["id"]
            for part in config["components"]
            if part.get("props", {}).get("elem_id") == "run-pick"
        ]
        [self._tick, self._timer] = next(
            [dependency["id"], target]
            for dependency in config["dependencies"]
            for target, event in dependency["targets"]
            if event == "tick" and pick in dependency["outputs"] and kinds[target] == "timer"
        )
        inputs = next(d["inputs"] for d in config["dependencies"] if d["id"] == self._tick)
        self._data = [run_id if number == pick else None for number in inputs]

    def tick(self) -> None:
        """Ask for what has changed, and take the answer.

        Raises:
            ValueError: The page failed.
        """
        asked = {
            "data": self._data,
            "event_data": None,
            "fn_index": self._tick,
            "trigger_id": self._timer,
            "session_hash": self._session,
        }
        self._client.post("/queue/join", json=asked).raise_for_status()
        with self._client.stream(
            "GET", "/queue/data", params={"session_hash": self._session}
        ) as answer:
            for message in _messages(answer):
                if message["msg"] == "process_completed" and not message["success"]:
                    raise ValueError(f"the page failed: {message}")

    def close(self) -> None:
        """Leave."""
        self._client.close()


def _messages(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data:"):
            message: dict[str, Any] = json.loads(line.removeprefix("data:"))
            if message["msg"] == "close_stream":
                return
            yield message


@contextmanager
def page(folder: Path, environment: dict[str, str], home: Path) -> Iterator[str]:
    """Serve the real page from a process of its own; no worker is started beside it."""
    port = free_port()
    command = [sys.executable, "-m", "studio", "up", "--home", str(home), "--port", str(port)]
    log = folder / "page.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment | {"STUDIO_EMBEDDED_WORKER": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(log.read_text(encoding="utf-8"))
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False, timeout=30).status_code == 200
    except httpx.TransportError:
        return False
