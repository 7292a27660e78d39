"""The HTTP side of a chat process: OpenAI's chat completions, as far as the studio speaks them.

https://platform.openai.com/docs/api-reference/chat: messages, tools, temperature, top_p, seed,
max_tokens, stop, stream; top_k and chat_template_kwargs as in vLLM. What is not listed here is
refused by name, never ignored. Not covered: n > 1, penalties, logprobs, tool_choice; calls of
tools stay text in the content.
"""

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Literal, NoReturn

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from studio.errors import InputError, StudioError
from workers.decode import Sampling
from workers.process import out_of_memory
from workers.reply import Piece
from workers.speakers import Question, Speakers

log = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 1024


class TemplateOptions(BaseModel):
    """What the chat template is told."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    enable_thinking: bool = False


class StreamOptions(BaseModel):
    """What a stream is asked to tell; its last piece tells the usage in any case."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = True


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    # Fields of OpenAI's that clients send by habit; only the value that changes nothing is taken.
    n: Literal[1] = 1
    frequency_penalty: float = Field(default=0.0, ge=0, le=0)
    presence_penalty: float = Field(default=0.0, ge=0, le=0)
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or any(not stop for stop in stops):
            raise ValueError("at most 4 stop sequences are taken, none of them empty")
        return value

    def question(self, speakers: Speakers) -> Question:
        """Return what is asked; unset values are the ones that the model's authors publish."""
        usual = speakers.usual_sampling
        return Question(
            speaker=self.model,
            messages=self.messages,
            tools=self.tools or [],
            enable_thinking=self.chat_template_kwargs.enable_thinking,
            sampling=Sampling(
                temperature=usual.temperature if self.temperature is None else self.temperature,
                top_p=usual.top_p if self.top_p is None else self.top_p,
                top_k=usual.top_k if self.top_k is None else self.top_k,
                seed=self.seed,
            ),
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or [],
            max_tokens=self.max_tokens or DEFAULT_MAX_TOKENS,
        )


class TokenGuard:
    """Answers 401 to whoever does not send the token: loopback is not private to one user.

    Args:
        app: What is guarded.
        token: What must follow `Bearer` in the header Authorization.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._wanted = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http":
            sent = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(sent, self._wanted):
                refusal = _error(401, "The bearer token is missing or wrong.", "authentication")
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def build_app(
    speakers: Speakers, *, token: str, lifespan: AbstractAsyncContextManager[None]
) -> FastAPI:
    """Build the HTTP application.

    Args:
        speakers: Who can be asked.
        token: What clients must send.
        lifespan: Entered when the server starts, left when it ends.
    """
    app = FastAPI(openapi_url=None, lifespan=lambda _app: lifespan)
    app.add_middleware(TokenGuard, token=token)
    app.add_exception_handler(RequestValidationError, _say_invalid)
    app.add_exception_handler(StarletteHTTPException, _say_http)
    app.add_exception_handler(InputError, _say_input)
    app.add_exception_handler(Exception, _say_fault)

    @app.get("/healthz")
    async def healthz() -> dict[str, str | int]:
        return {"status": "ok", "replies": speakers.num_replies}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [{"id": name, "object": "model", "owned_by": "studio"} for name in speakers.names]
        return {"object": "list", "data": cards}

    @app.post("/v1/chat/completions")
    async def complete(asked: ChatRequest, request: Request) -> Response:
        if asked.model not in speakers.names:
            _refuse_model(asked.model, speakers)
        question = asked.question(speakers)
        prompt = await speakers.read(question)
        answer = _watched(speakers.answer(question, prompt), request)
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
        }
        if asked.stream:
            events = _events(head, answer, len(prompt))
            return StreamingResponse(events, media_type="text/event-stream")
        return await _whole(head, answer, len(prompt))

    return app


def _refuse_model(name: str, speakers: Speakers) -> NoReturn:
    known = ", ".join(speakers.names)
    raise HTTPException(404, f"There is no model {name!r} here. Choose one of: {known}.")


async def _watched(answer: AsyncGenerator[Piece], request: Request) -> AsyncGenerator[Piece]:
    """Stop asking for pieces once the client has gone; the model is free after one step."""
    async with aclosing(answer):
        async for piece in answer:
            if await request.is_disconnected():
                log.info("The client has gone after %s tokens.", piece.num_tokens)
                return
            yield piece


async def _whole(
    head: Mapping[str, Any], answer: AsyncIterator[Piece], prompt_tokens: int
) -> Response:
    reasoning, content, last = "", "", Piece()
    try:
        async for last in answer:
            reasoning += last.reasoning
            content += last.content
    except (StudioError, RuntimeError) as error:
        return _failed(error)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    choice = {"index": 0, "message": message, "finish_reason": last.finish_reason}
    usage = _usage(prompt_tokens, last)
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


async def _events(
    head: Mapping[str, Any], answer: AsyncIterator[Piece], prompt_tokens: int
) -> AsyncIterator[str]:
    yield _chunk(head, {"role": "assistant", "content": ""})
    try:
        async for piece in answer:
            if piece.reasoning:
                yield _chunk(head, {"reasoning_content": piece.reasoning})
            if piece.content:
                yield _chunk(head, {"content": piece.content})
            if piece.finish_reason is not None:
                yield _chunk(head, {}, piece.finish_reason, _usage(prompt_tokens, piece))
    except (StudioError, RuntimeError) as error:
        # The status 200 is sent already; clients of OpenAI's find errors in the stream, too.
        yield f"data: {bytes(_failed(error).body).decode()}\n\n"
        return
    yield "data: [DONE]\n\n"


def _chunk(
    head: Mapping[str, Any],
    delta: Mapping[str, str],
    finish_reason: str | None = None,
    usage: Mapping[str, int] | None = None,
) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    body = {**head, "object": "chat.completion.chunk", "choices": [choice]}
    if usage is not None:
        body["usage"] = usage
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(prompt_tokens: int, last: Piece) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": last.num_tokens,
        "total_tokens": prompt_tokens + last.num_tokens,
    }


# ---- errors: {"error": {"message", "type"}}, sentences, never tracebacks ----------------------


def _error(status: int, message: str, kind: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status)


def _failed(error: Exception) -> JSONResponse:
    """Say why a reply broke off. RuntimeError is what torch raises, out of memory included."""
    log.error("A reply broke off.", exc_info=error)
    if isinstance(error, StudioError):
        return _error(500, str(error), "server_error")
    if "out of memory" in str(error):
        return _error(500, str(out_of_memory(error)), "server_error")
    return _error(500, "The reply broke off; the log of the chat says why.", "server_error")


async def _say_fault(_request: Request, _fault: Exception) -> Response:
    return _error(500, "This is a fault of the studio; the log says more.", "server_error")


async def _say_input(_request: Request, error: Exception) -> Response:
    return _error(400, str(error), "invalid_request_error")


async def _say_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _error(error.status_code, str(error.detail), "invalid_request_error")


async def _say_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"][1:]) or "the body"
        if item["type"] == "extra_forbidden":
            said.append(f"{field} is not a field that this server knows")
        else:
            reason = str(item["msg"]).removeprefix("Value error, ")
            said.append(f"{field}: {reason[:1].lower()}{reason[1:]}")
    return _error(422, "; ".join(said) + ".", "invalid_request_error")
