"""The chat as the page streams it: rarely enough for a browser, whole at the end, stopped at once."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from studio.domain.run import RunState
from studio.errors import EngineError, InputError
from studio.services.studio import Studio
from studio.store.rows import ChatRow, RunRow
from studio.ui.chats_tab import UPDATE_SECONDS, History, talk
from tests.rows import add_run
from tests.serving import serve

KNOBS = ("", 0, 1, 400, 0, False)
TOKEN_SECONDS = 0.002


class Models:
    """What a chat process is to the page: both models answer `word 0 `, `word 1 ` and so on."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.asked: list[dict[str, Any]] = []
        self.num_told = 0
        self.refuse = ""
        self.break_after: int | None = None
        self.app.post("/v1/chat/completions")(self.complete)

    async def complete(self, request: Request) -> Response:
        """Answer a question."""
        self.asked.append(await request.json())
        if self.refuse:
            return JSONResponse({"error": {"message": self.refuse}}, status_code=400)
        answer = self.tell(self.asked[-1]["model"], self.asked[-1]["max_tokens"])
        return StreamingResponse(answer, media_type="text/event-stream")

    async def tell(self, model: str, num_tokens: int) -> AsyncIterator[str]:
        """Yield an answer as OpenAI's protocol streams it."""
        for number in range(num_tokens):
            if number == self.break_after:
                yield f"data: {json.dumps({'error': {'message': 'It broke off.'}})}\n\n"
                return
            yield f"data: {json.dumps({'choices': [{'delta': {'content': word(number)}}]})}\n\n"
            self.num_told += 1
            await asyncio.sleep(TOKEN_SECONDS)
        yield "data: [DONE]\n\n"


def word(number: int) -> str:
    return f"word {number} "


@pytest.fixture
def models() -> Models:
    return Models()


@pytest.fixture
def key(studio: Studio, models: Models) -> Iterator[str]:
    """A Run whose chat process is there."""
    number = add_run(studio.database)
    studio.home.run(number).adapter.mkdir(parents=True)
    for base in serve(models.app):
        with studio.database.write() as session:
            run = session.get(RunRow, number)
            assert run is not None
            run.state = RunState.FINISHED
            chat = ChatRow(
                run_id=number,
                token="t",
                state=RunState.RUNNING,
                port=int(base.rpartition(":")[2]),
                created_at=time.time(),
                last_used_at=time.time(),
            )
            session.add(chat)
        yield f"run:{number}"


def texts_of(update: Any) -> list[str]:
    """Return what both models have said, of what the page is told."""
    return [str(history[-1]["content"]) for history in update[1:3]]


def test_the_page_is_told_a_few_times_a_second_and_the_whole_answer_at_the_end(
    studio: Studio, key: str
) -> None:
    updates = [(time.monotonic(), update) for update in talk(studio, key, "Well?", ([], []), KNOBS)]
    whole = "".join(word(number) for number in range(400))
    assert texts_of(updates[-1][1]) == [whole, whole]
    # The first says that the model is opened; the first words come as soon as they are there.
    times = [moment for moment, _ in updates[1:]]
    assert len(times) > 2
    assert min(after - before for before, after in pairwise(times)) >= UPDATE_SECONDS


def test_the_question_leaves_its_box_with_the_first_words(studio: Studio, key: str) -> None:
    opening, first, *later = talk(studio, key, "Well?", ([], []), KNOBS)
    assert "Opening" in opening[3]
    assert first[0] == ""
    assert "Opening" not in first[3]
    assert all(update[0] != "" for update in later)
    assert first[1][0] == {"role": "user", "content": "Well?"}


def test_a_talk_that_is_closed_stops_both_models(studio: Studio, key: str, models: Models) -> None:
    talking = talk(studio, key, "Well?", ([], []), (*KNOBS[:3], 2048, *KNOBS[4:]))
    for update in talking:
        if all(text.startswith(word(0)) for text in texts_of(update)):
            break
    talking.close()  # type: ignore[attr-defined]  # it is a generator
    time.sleep(1)
    told = models.num_told
    time.sleep(0.5)
    assert models.num_told == told
    assert told < 2 * 2048


def test_a_refused_question_stays_in_its_box(studio: Studio, key: str, models: Models) -> None:
    models.refuse = "The prompt is too long."
    talking = talk(studio, key, "Well?", ([], []), KNOBS)
    next(talking)
    with pytest.raises(EngineError, match="too long"):
        next(talking)


def test_what_was_written_before_a_fault_stays(studio: Studio, key: str, models: Models) -> None:
    models.break_after = 5
    updates: list[Any] = []
    talking = talk(studio, key, "Well?", ([], []), KNOBS)
    with pytest.raises(EngineError, match="broke off"):
        deque(map(updates.append, talking), maxlen=0)
    assert any(text.startswith(word(0)) for text in texts_of(updates[-1]))


def test_earlier_turns_are_told_without_their_reasoning(
    studio: Studio, key: str, models: Models
) -> None:
    thought = {"role": "assistant", "content": "Hm.", "metadata": {"title": "Reasoning"}}
    said = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    asked = {"role": "user", "content": "Sure?"}
    history: History = [asked, thought, said]
    list(talk(studio, key, "Why?", (history, history), ("Be brief.", 0, 1, 3, 0, False)))
    assert sorted(body["model"] for body in models.asked) == ["base", "tuned"]
    assert models.asked[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        asked,
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]


def test_an_empty_question_is_not_asked(studio: Studio, key: str, models: Models) -> None:
    with pytest.raises(InputError, match="empty"):
        next(talk(studio, key, " ", ([], []), KNOBS))
    assert not models.asked
