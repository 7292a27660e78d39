"""Verbs of Chats: open a chat process, talk to it, close it; ask the example questions."""

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import yaml

from studio.disk import write_whole
from studio.dispatch import Bell
from studio.domain.proof import Answer, Recall
from studio.domain.run import LIVE, RunState
from studio.errors import ConflictError, EngineError, NotFoundError
from studio.services import artifacts, datasets
from studio.services.studio import Studio
from studio.settings import LOOPBACK
from studio.store import chats as store
from studio.store import leases
from studio.store.rows import ChatRow, RunRow

MAX_OPEN = 2
OPEN_SECONDS = 600.0
ANSWER_SECONDS = 600.0

Side = Literal["base", "tuned"]
Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        max_tokens: Longest answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    enable_thinking: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """A piece of an answer.

    Attributes:
        finish_reason: `stop` or `length` in the last piece, else None.
        completion_tokens: Tokens of the whole answer, in the last piece.
    """

    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    completion_tokens: int | None = None


def open_chat(studio: Studio, run_id: int, artifact_id: int | None = None) -> ChatRow:
    """Order a chat process for a Run's Adapter or for a Merge; returns at once.

    The oldest chat process makes room when too many are open.

    Raises:
        NotFoundError: There is no such Run or Merge.
        ConflictError: The Run has no Adapter, or the Merge is not ready.
    """
    artifacts.require_result(studio, run_id)
    if artifact_id is not None and artifacts.get(studio, artifact_id).state != RunState.FINISHED:
        raise ConflictError(f"Merge {artifact_id} is not ready.", "Wait until it has finished.")
    now = time.time()
    with studio.database.write() as session:
        known = store.usable(session, run_id, artifact_id)
        if known is not None:
            known.last_used_at = now
            return known
        others = sorted(leases.live(session, ChatRow), key=lambda row: row.last_used_at)
        for row in others[: max(0, len(others) - MAX_OPEN + 1)]:
            leases.move(session, ChatRow, row.id, RunState.STOPPING)
        row = ChatRow(
            run_id=run_id,
            artifact_id=artifact_id,
            token=secrets.token_urlsafe(24),
            state=RunState.QUEUED,
            created_at=now,
            last_used_at=now,
        )
        session.add(row)
    studio.dispatch.ring(Bell.SERVE)
    return get(studio, row.id)


def get(studio: Studio, chat_id: int) -> ChatRow:
    """Return a Chat.

    Raises:
        NotFoundError: There is no such Chat.
    """
    with studio.database.read() as session:
        row = session.get(ChatRow, chat_id)
    if row is None:
        raise NotFoundError(f"There is no chat {chat_id}.", "Open it again.")
    return row


def wait_ready(studio: Studio, chat_id: int, tell: Callable[[str], None]) -> ChatRow:
    """Wait until a chat process answers.

    Args:
        studio: The installation.
        chat_id: The Chat.
        tell: Called with what the process does meanwhile.

    Raises:
        EngineError: It failed, was closed, or did not get ready in ten minutes.
    """
    deadline = time.monotonic() + OPEN_SECONDS
    while time.monotonic() < deadline:
        row = get(studio, chat_id)
        if row.state == RunState.FAILED:
            words = row.error or {}
            raise EngineError(words.get("message", "The chat failed."), words.get("hint", ""))
        if row.state not in (RunState.QUEUED, RunState.RUNNING):
            raise EngineError("The chat was closed.", "Open it again.")
        if row.port is not None:
            return row
        tell(row.stage or ("waiting for a worker" if row.state == RunState.QUEUED else "starting"))
        time.sleep(0.2)
    raise EngineError("The chat did not get ready in ten minutes.", "Its log says why.")


def ask(
    studio: Studio, chat: ChatRow, side: Side, messages: Messages, sampling: Sampling
) -> Iterator[Delta]:
    """Stream an answer; closing the iterator stops the model within one token.

    Raises:
        EngineError: The chat process is gone, or refuses the request and says why.
    """
    with studio.database.write() as session:
        row = session.get(ChatRow, chat.id)
        if row is not None and row.state in LIVE:
            row.last_used_at = time.time()
    body = {
        "model": side,
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "chat_template_kwargs": {"enable_thinking": sampling.enable_thinking},
    }
    is_here = chat.host in (None, socket.gethostname())
    host = LOOPBACK[0] if is_here else chat.host
    url = f"http://{host}:{chat.port}/v1/chat/completions"
    headers = {"Authorization": f"Bearer {chat.token}"}
    try:
        with (
            httpx.Client(timeout=ANSWER_SECONDS, trust_env=False) as client,
            client.stream("POST", url, json=body, headers=headers) as response,
        ):
            if response.status_code != 200:
                raise _refusal(response)
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield _delta(json.loads(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        raise EngineError(
            f"The chat process does not answer ({type(error).__name__}).", "Open the chat again."
        ) from error


def _refusal(response: httpx.Response) -> EngineError:
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"The chat process answered with code {response.status_code}."
    return EngineError(str(message), "")


def _delta(chunk: dict[str, Any]) -> Delta:
    if "error" in chunk:
        raise EngineError(str(chunk["error"].get("message", "The chat process failed.")), "")
    usage = chunk.get("usage") or {}
    tokens = usage.get("completion_tokens")
    if not chunk.get("choices"):
        return Delta(completion_tokens=tokens)
    choice = chunk["choices"][0]
    delta = choice.get("delta") or {}
    return Delta(
        content=delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or "",
        finish_reason=choice.get("finish_reason"),
        completion_tokens=tokens,
    )


def answer(
    studio: Studio, chat: ChatRow, side: Side, messages: Messages, sampling: Sampling
) -> str:
    """Return a whole answer.

    Raises:
        EngineError: As for `ask`.
    """
    return "".join(delta.content for delta in ask(studio, chat, side, messages, sampling))


def close_chat(studio: Studio, chat_id: int) -> None:
    """Close a chat process; one that is closed already stays so."""
    with studio.database.write() as session:
        if not leases.move(session, ChatRow, chat_id, RunState.STOPPING):
            leases.move(session, ChatRow, chat_id, RunState.STOPPED)


# ---- the questions of the example data set ----------------------------------------------------


def can_recall(studio: Studio, run: RunRow) -> bool:
    """Whether a Run was trained on the example data set, to which there are questions."""
    return run.dataset.sha256 == datasets.example_sha256(datasets.example_file(studio))


def questions(studio: Studio) -> list[dict[str, str]]:
    """Return the factual questions of the example data set: {question, fact}."""
    path = studio.templates / "data" / "tidemark-questions.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [dict(item) for item in values["questions"]]


def recall(studio: Studio, run: RunRow, chat: ChatRow, tell: Callable[[int, int], None]) -> Recall:
    """Ask base and tuned model the factual questions, and keep the answers with the Run.

    Args:
        studio: The installation.
        run: A Run on the example data set.
        chat: Its chat process, ready.
        tell: Called with questions done and questions in all.

    Returns:
        The answers.

    Raises:
        EngineError: The chat process failed.
    """
    asked = questions(studio)
    answers = []
    for number, item in enumerate(asked):
        tell(number, len(asked))
        messages = [{"role": "user", "content": item["question"]}]
        sampling = Sampling(max_tokens=48)
        answers.append(
            Answer(
                question=item["question"],
                fact=str(item["fact"]),
                base=answer(studio, chat, "base", messages, sampling),
                tuned=answer(studio, chat, "tuned", messages, sampling),
            )
        )
    tell(len(asked), len(asked))
    result = Recall(answers=tuple(answers))
    write_whole(studio.home.run(run.id).recall, result.model_dump_json(indent=2) + "\n")
    return result
