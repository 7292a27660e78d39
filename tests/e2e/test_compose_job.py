"""The main job through the services of docker-compose.yml, each a process of this machine."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from studio.disk import TEMPLATES
from tests.compose import ROOT
from tests.e2e.stack import Stack, overheard, running
from tests.servers import ProgramMissingError, find_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLE = TEMPLATES / "data" / "tidemark-support.jsonl"
BELLS = ("train", "merge", "serve")
SPEC = "preset: tiny-qwen3.5\ndata: {dataset: desk}\ntrain: {max_steps: 4}\n"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, verdicts: Path) -> Iterator[Stack]:
    try:
        for program, package in (("redis-server", "redis-server"), ("initdb", "postgresql")):
            find_program(program, package)
    except ProgramMissingError as error:
        pytest.skip(str(error))
    with running(tmp_path_factory.mktemp("compose"), verdicts) as started:
        yield started


def studio(stack: Stack, *words: str) -> Any:
    """Do what `docker compose exec web studio ... --json` does, and return what it prints."""
    done = subprocess.run(
        [*stack.command("web", ["studio"]), *words, "--json"],
        env=stack.environment("web"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + stack.log("worker").read_text()[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def job(stack: Stack) -> dict[str, Any]:
    """The main job, done once: what each of its commands said, and what Redis heard of it."""
    spec = stack.folder / "spec.yaml"
    spec.write_text(SPEC)
    question = ("-m", "How long is the Tidemark warranty?", "--max-tokens", "6")
    with overheard(stack) as heard:
        done = {
            "dataset": studio(stack, "dataset", "add", str(EXAMPLE), "--name", "desk"),
            "run": studio(stack, "run", str(spec), "--wait"),
            "merge": studio(stack, "merge", "1", "--wait"),
            "chat": studio(stack, "chat", "1", *question),
        }
    return {**done, "heard": heard.read_text()}


def test_the_main_job_succeeds(stack: Stack, job: dict[str, Any]) -> None:
    assert job["dataset"]["num_conversations"] == 200
    assert (job["run"]["state"], job["run"]["step"]) == ("FINISHED", 4)
    assert (job["merge"]["state"], job["merge"]["certificate_passed"]) == ("FINISHED", True)
    assert Path(job["merge"]["folder"]).is_relative_to(stack.home.path)
    assert job["chat"]["model"] == "tuned"
    proofs = {proof["name"]: proof["passed"] for proof in studio(stack, "show", "1")["proofs"]}
    assert proofs["targets"]
    assert proofs["mask"]


@pytest.mark.usefixtures("job")
def test_the_rows_are_in_postgresql_and_nowhere_else(stack: Stack) -> None:
    with stack.connect() as connection:
        for table in ("datasets", "runs", "artifacts", "chats"):
            (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone() or (0,)
            assert count == 1, table
        state = connection.execute("SELECT state FROM runs").fetchone()
        assert state == ("FINISHED",)
    assert list(stack.home.path.glob("*.db*")) == []


def test_the_bells_went_through_redis(stack: Stack, job: dict[str, Any]) -> None:
    pushed = [line for line in job["heard"].splitlines() if '"LPUSH"' in line]
    for bell in BELLS:
        assert any(f"workers.tasks.{bell}" in line for line in pushed), bell
    assert [path for path in stack.home.broker.rglob("*") if path.is_file()] == []


def test_the_page_answers_the_browser_of_this_machine_and_no_other_name(stack: Stack) -> None:
    port = stack.ports["web"]
    codes = {}
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"0.0.0.0:{port}", "web:7860"):
        answer = httpx.get(
            f"http://127.0.0.1:{port}/healthz", headers={"Host": host}, trust_env=False
        )
        codes[host.partition(":")[0]] = answer.status_code
        if answer.status_code == 200:
            assert answer.json()["worker"] is True
    assert codes == {"localhost": 200, "127.0.0.1": 200, "0.0.0.0": 400, "web": 400}
    assert "lets everyone in" in stack.log("web").read_text()


def test_redis_asks_for_its_password(stack: Stack) -> None:
    command = ["redis-cli", "-p", str(stack.ports["redis"]), "ping"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.stdout.startswith("NOAUTH")


@pytest.mark.usefixtures("job")
def test_no_password_lies_about(stack: Stack) -> None:
    passwords = [stack.secret(name).encode() for name in ("redis", "postgres")]
    written = [
        *stack.home.path.rglob("*"),
        *(stack.log(name) for name in ("web", "worker", "redis")),
    ]
    guilty = [
        str(path)
        for path in written
        if path.is_file() and any(word in path.read_bytes() for word in passwords)
    ]
    for process in stack.processes.values():
        for file in ("cmdline", "environ"):
            content = Path(f"/proc/{process.pid}/{file}").read_bytes()
            guilty += [f"{process.args!r} {file}" for word in passwords if word in content]
    assert guilty == []


@pytest.mark.usefixtures("job")
def test_a_service_that_is_stopped_ends_in_order_and_is_not_well(stack: Stack) -> None:
    assert all(stack.is_well(name) for name in ("web", "worker", "redis", "postgres"))
    # The page first: a worker does not mind, and the page starts none by itself.
    assert stack.stop("web") in (0, -signal.SIGTERM)  # uvicorn ends in order, then by the signal
    assert (stack.is_well("web"), stack.is_well("worker")) == (False, True)
    assert stack.stop("worker") == 0
    assert not stack.is_well("worker")
    stack.start("web")
    assert not stack.is_well("worker")
