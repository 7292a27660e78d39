"""Chat: base and tuned model side by side, streaming, with a stop button."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from studio.errors import InputError, NotFoundError, StudioError
from studio.services import artifacts, chats, runs
from studio.services.chats import Sampling, Side
from studio.services.studio import Studio
from studio.store.rows import ChatRow, RunRow
from studio.ui import show
from studio.ui.edge import shown

SIDES: tuple[Side, Side] = ("base", "tuned")
EMPTY = show.empty("Nobody to talk to yet", "Train a run first; its adapter can be talked to.")
# An update costs the browser 30 to 100 ms of a core, however little is new (measured: Gradio 6.31).
# One at every token of two models is more than it can do, and a click on Stop waits behind them all.
UPDATE_SECONDS = 0.25
History = list[dict[str, Any]]
# Of a side: a piece of its answer, why it has none, or None at its end.
Arrival = tuple[int, chats.Delta | StudioError | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatsTab:
    """Components that other tabs and the page's start refer to."""

    pick: gr.Dropdown


def choices(studio: Studio) -> list[tuple[str, str]]:
    """Return everything that can be talked to as (label, key): adapters and merges."""
    merged = [
        (f"merge {row.id} · run {row.run_id} · {row.run.name}", f"merge:{row.id}")
        for row in artifacts.finished(studio)
    ]
    adapters = [
        (f"{_kind(row)} of run {row.id} · {row.name}", f"run:{row.id}")
        for row in runs.listing(studio)
        if artifacts.has_result(studio, row)
    ]
    return merged + adapters


def _kind(row: RunRow) -> str:
    return "model" if (row.result or {}).get("method") == "full" else "adapter"


def note_for(studio: Studio, key: str | None) -> str:
    """Return what stands above the chat: a warning that a tiny base only makes noise."""
    if not key:
        return EMPTY
    run = runs.get(studio, _run_id(studio, key))
    if not runs.spec_of(run).model.id.startswith("tiny/"):
        return ""
    return show.notice(
        "info",
        "The base is a tiny model with random weights: its answers are noise. "
        "What the tuned model says, it has learned in the run.",
    )


def _run_id(studio: Studio, key: str) -> int:
    kind, _, number = key.partition(":")
    return artifacts.get(studio, int(number)).run_id if kind == "merge" else int(number)


def build(studio: Studio) -> ChatsTab:
    """Lay out the tab and wire its events."""
    with gr.Row(equal_height=True):
        pick = gr.Dropdown(
            choices=[],
            label="Tuned model",
            info="A merged model, or a run's adapter on its base.",
            scale=3,
            interactive=True,
            elem_id="chat-pick",
        )
        ask_all = gr.Button(
            "Ask the ten example questions", scale=1, min_width=180, elem_id="chat-recall"
        )
    note = gr.HTML(EMPTY, elem_id="chat-note")
    with gr.Row():
        base = _chatbot("Base", "chat-base")
        tuned = _chatbot("Tuned", "chat-tuned")
    message, send, halt, clear = _entry()
    with gr.Accordion("Settings", open=False):
        settings = _settings()
    answers = gr.HTML(elem_id="chat-answers")

    def answer(key: str | None, text: str, left: History, right: History, *knobs: Any) -> Any:
        yield from talk(studio, key, text, (left or [], right or []), knobs)

    def recall(key: str | None, progress: Any = gr.Progress()) -> str:
        return _recall(studio, key, progress)

    parts = [message, base, tuned, note, send, halt]
    running = gr.on(
        [send.click, message.submit],
        shown(answer),
        [pick, message, base, tuned, *settings],
        parts,
        show_progress="hidden",
        concurrency_limit=8,
    )
    idle: dict[str, Any] = {
        "fn": shown(lambda key: (*_idle(), note_for(studio, key))),
        "inputs": pick,
        "outputs": [send, halt, note],
        "show_progress": "hidden",
    }
    running.then(**idle)
    halt.click(**idle, cancels=[running])
    clear.click(lambda: ([], [], ""), None, [base, tuned, answers], cancels=[running]).then(**idle)
    pick.change(
        shown(lambda key: ([], [], "", note_for(studio, key))),
        pick,
        [base, tuned, answers, note],
        show_progress="hidden",
    )
    ask_all.click(shown(recall), pick, answers)
    return ChatsTab(pick=pick)


def _entry() -> tuple[gr.Textbox, gr.Button, gr.Button, gr.Button]:
    """Lay out where one writes: message, send, stop, clear."""
    with gr.Row(equal_height=True):
        message = gr.Textbox(
            placeholder="Ask both models something ...",
            show_label=False,
            container=False,
            scale=6,
            max_lines=6,
            elem_id="chat-message",
            autofocus=False,
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="chat-send")
        halt = gr.Button(
            "Stop", variant="stop", scale=1, min_width=80, interactive=False, elem_id="chat-stop"
        )
        clear = gr.Button("Clear", scale=1, min_width=80, elem_id="chat-clear")
    return message, send, halt, clear


def _chatbot(label: str, elem_id: str) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        height=380,
        allow_tags=False,
        feedback_options=None,
        buttons=["copy"],
        elem_id=elem_id,
        min_width=280,
        placeholder="",
    )


def _settings() -> list[gr.components.Component]:
    with gr.Row():
        return [
            gr.Textbox(
                label="System message",
                info="Stands before every conversation.",
                min_width=240,
                max_lines=4,
                elem_id="chat-system",
            ),
            gr.Slider(
                0,
                2,
                0,
                step=0.05,
                label="Temperature",
                min_width=160,
                info="0 takes the likeliest token each time.",
            ),
            gr.Slider(
                0.05,
                1,
                1,
                step=0.05,
                label="Top-p",
                min_width=160,
                info="Share of likely tokens that are drawn from.",
            ),
            gr.Slider(1, 2048, 128, step=1, label="Longest answer (tokens)", min_width=160),
            gr.Number(0, label="Seed", precision=0, min_width=100, minimum=0),
            gr.Checkbox(label="Thinking", info="Lets the model reason first.", min_width=120),
        ]


def _idle() -> tuple[Any, Any]:
    return gr.Button(interactive=True), gr.Button(interactive=False)


def _open(studio: Studio, key: str | None) -> ChatRow:
    if not key:
        raise NotFoundError("No tuned model is chosen.", "Train a run first, then choose it here.")
    kind, _, number = key.partition(":")
    if kind == "merge":
        merge = artifacts.get(studio, int(number))
        return chats.open_chat(studio, merge.run_id, merge.id)
    return chats.open_chat(studio, int(number))


def talk(
    studio: Studio,
    key: str | None,
    text: str,
    histories: tuple[History, History],
    knobs: tuple[Any, ...],
) -> Iterator[Any]:
    """Stream both answers; closing the generator stops both models."""
    if not text or not text.strip():
        raise InputError("The message is empty.", "Write a question first.")
    system, temperature, top_p, max_tokens, seed, thinking = knobs
    sampling = Sampling(
        temperature=float(temperature),
        top_p=float(top_p),
        max_tokens=int(max_tokens),
        seed=int(seed or 0),
        enable_thinking=bool(thinking),
    )
    asked: list[History] = [[*history, {"role": "user", "content": text}] for history in histories]
    busy = (gr.Button(interactive=False), gr.Button(interactive=True))
    opening = show.notice("info", "Opening the model ...")
    yield gr.skip(), *asked, opening, *busy
    row = _open(studio, key)
    row = chats.wait_ready(studio, row.id, lambda _: None)
    requests = [_plain(history, (system or "").strip()) for history in asked]
    rest, note = "", note_for(studio, key)
    for answers in _both(studio, row, requests, sampling):
        shown_now = [[*history, *answer] for history, answer in zip(asked, answers, strict=True)]
        yield rest, *shown_now, note, gr.skip(), gr.skip()
        rest = note = gr.skip()


def _plain(history: History, system: str) -> History:
    """Return a history as the API takes it: no titles, reasoning of earlier turns left out."""
    plain = [
        {"role": turn["role"], "content": _text(turn["content"])}
        for turn in history
        if not (turn.get("metadata") or {}).get("title")
    ]
    return [{"role": "system", "content": system}, *plain] if system else plain


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


def _both(
    studio: Studio, row: ChatRow, requests: list[History], sampling: Sampling
) -> Iterator[list[History]]:
    """Yield the two answers as they grow, not more often than a browser can show them."""
    pieces: queue.Queue[Arrival] = queue.Queue()
    closed = threading.Event()
    for side, name in enumerate(SIDES):
        ask = partial(chats.ask, studio, row, name, requests[side], sampling)
        threading.Thread(target=_pour, args=(ask, side, pieces, closed), daemon=True).start()
    content, reasoning, left, due = ["", ""], ["", ""], len(SIDES), 0.0
    try:
        while left:
            failed = None
            for side, piece in _gathered(pieces, due):
                if isinstance(piece, chats.Delta):
                    content[side] += piece.content
                    reasoning[side] += piece.reasoning
                else:
                    left, failed = left - 1, failed or piece
            # What was written stays on the page; a question that is refused stays in its box.
            if failed is None or any(content + reasoning):
                yield [_turns(r, c) for r, c in zip(reasoning, content, strict=True)]
            if failed is not None:
                raise failed
            due = time.monotonic() + UPDATE_SECONDS
    finally:
        closed.set()


def _pour(
    ask: Callable[[], Iterator[chats.Delta]],
    side: int,
    pieces: queue.Queue[Arrival],
    closed: threading.Event,
) -> None:
    try:
        for delta in ask():
            pieces.put((side, delta))
            if closed.is_set():
                return
        pieces.put((side, None))
    except StudioError as error:
        pieces.put((side, error))


def _gathered(pieces: queue.Queue[Arrival], due: float) -> list[Arrival]:
    """Return all that has arrived, at least one; waits until `due` (of the monotonic clock)."""
    arrived = [pieces.get()]
    time.sleep(max(0.0, due - time.monotonic()))
    while not pieces.empty():
        arrived.append(pieces.get())
    return arrived


def _turns(reasoning: str, content: str) -> History:
    turns: History = []
    if reasoning:
        turns.append(
            {"role": "assistant", "content": reasoning, "metadata": {"title": "Reasoning"}}
        )
    turns.append({"role": "assistant", "content": content})
    return turns


def _recall(studio: Studio, key: str | None, progress: Any) -> str:
    row = _open(studio, key)
    run = runs.get(studio, row.run_id)
    if not chats.can_recall(studio, run):
        raise InputError(
            f"The questions belong to the example data set, and run {run.id} was trained on "
            f"{run.dataset.name}.",
            "Choose a run that was trained on the example data set.",
        )
    progress(0, desc="Opening the model")
    row = chats.wait_ready(studio, row.id, lambda text: progress(0, desc=text))
    found = chats.recall(
        studio, run, row, lambda done, total: progress((done, total), desc="Asking")
    )
    return show.recall(found)
