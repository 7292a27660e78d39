"""Routes of resumable uploads: tus 1.0, the core with creation and termination.

The protocol: https://tus.io/protocols/resumable-upload. No route hands the bytes out again.

Why not the library tuspyserver (4.4): it writes and waits for its lock on the event loop, so that
one slow disk or one locked upload stops the whole page; it computes no hash, keeps no disk room
free, serves what was uploaded by GET and builds its Location from X-Forwarded-Host.

The guard stands in front: requests of other sites never come here.
"""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from studio.errors import ConflictError, InputError, MachineError, NotFoundError, StudioError
from studio.services import uploads
from studio.services.receiving import Receiver, Writing
from studio.services.studio import Studio
from studio.services.uploads import Upload

VERSION = "1.0.0"
EXTENSIONS = "creation,termination"
BODY = "application/offset+octet-stream"
# Written and hashed in a thread at a time, while the next block arrives.
BLOCK_BYTES = 4 * 2**20
# A browser that fell silent shall not hold the upload's lock against its own next try.
IDLE_SECONDS = 30.0

_Answer = Callable[[Request], Awaitable[Response]]


def mount_uploads(app: FastAPI, studio: Studio) -> None:
    """Add the routes of uploads, and sweep what earlier uploads left.

    Args:
        app: The application; call this before anything is mounted at its root.
        studio: The installation.
    """
    uploads.sweep(studio)
    receiver = Receiver(studio)

    async def options(_: Request) -> Response:
        limit = str(studio.settings.max_upload_bytes)
        known = {"Tus-Version": VERSION, "Tus-Extension": EXTENSIONS, "Tus-Max-Size": limit}
        return Response(status_code=204, headers=known)

    async def create(request: Request) -> Response:
        name = _file_name(request.headers.get("upload-metadata", ""))
        size = _number(request, "Upload-Length")
        upload = await run_in_threadpool(uploads.create, studio, name, size)
        return Response(status_code=201, headers={"Location": f"/uploads/{upload.id}"})

    async def head(request: Request) -> Response:
        upload = await run_in_threadpool(uploads.find, studio, request.path_params["upload_id"])
        return Response(headers=_state(upload))

    async def patch(request: Request) -> Response:
        if request.headers.get("content-type") != BODY:
            return _refusal(415, InputError(f"The body's type must be {BODY}."))
        offset, upload_id = _number(request, "Upload-Offset"), request.path_params["upload_id"]
        writing = await run_in_threadpool(receiver.open, upload_id, offset)
        try:
            await _receive(request, writing)
        finally:
            # Shielded: a cancelled request, too, has to release the upload.
            closing = asyncio.ensure_future(run_in_threadpool(receiver.close, writing))
            upload = await asyncio.shield(closing)
        return Response(status_code=204, headers=_state(upload))

    async def delete(request: Request) -> Response:
        upload_id = request.path_params["upload_id"]
        await run_in_threadpool(uploads.discard, studio, upload_id)
        receiver.forget(upload_id)
        return Response(status_code=204)

    app.add_route("/uploads", _spoken(options), methods=["OPTIONS"])
    app.add_route("/uploads", _spoken(create), methods=["POST"])
    one = "/uploads/{upload_id}"
    app.add_route(one, _spoken(options), methods=["OPTIONS"])
    app.add_route(one, _spoken(head), methods=["HEAD"])
    app.add_route(one, _spoken(patch), methods=["PATCH"])
    app.add_route(one, _spoken(delete), methods=["DELETE"])


async def _receive(request: Request, writing: Writing) -> None:
    """Append the body, a block in a thread while the next one arrives."""
    block, task = bytearray(), None
    try:
        async for part in _parts(request):
            block += part
            if len(block) >= BLOCK_BYTES:
                if task is not None:
                    await task
                task = asyncio.ensure_future(run_in_threadpool(writing.write, block))
                block = bytearray()
    finally:
        # What came before the line broke is kept: the browser goes on behind it.
        if task is not None:
            await asyncio.shield(task)
        await asyncio.shield(asyncio.ensure_future(run_in_threadpool(writing.write, block)))


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """Yield the body's parts until it ends, the line breaks or nothing comes any more."""
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                part = await anext(stream)
        except (StopAsyncIteration, ClientDisconnect, TimeoutError):
            return
        yield part


# ---- headers ----------------------------------------------------------------------------------


def _spoken(answer: _Answer) -> _Answer:
    """Wrap a route: it speaks version 1.0.0 of tus, and errors become sentences as JSON."""

    async def spoken(request: Request) -> Response:
        try:
            version = request.headers.get("tus-resumable", VERSION)
            if version != VERSION and request.method != "OPTIONS":
                error = InputError(f"This is tus {VERSION}, not {version!r}.", "Reload the page.")
                response = _refusal(412, error)
                response.headers["Tus-Version"] = VERSION
            else:
                response = await answer(request)
        except StudioError as error:
            response = _refusal(_status(error), error)
        response.headers["Tus-Resumable"] = VERSION
        response.headers["Cache-Control"] = "no-store"
        return response

    return spoken


def _status(error: StudioError) -> int:
    if isinstance(error, NotFoundError):
        return 404
    if isinstance(error, ConflictError):
        return 409
    if isinstance(error, MachineError):
        return 507
    return 413 if error.field == "size_bytes" else 400


def _refusal(status: int, error: StudioError) -> Response:
    words = {"message": error.message, "hint": error.hint}
    return Response(json.dumps(words), status_code=status, media_type="application/json")


def _state(upload: Upload) -> dict[str, str]:
    state = {"Upload-Offset": str(upload.offset), "Upload-Length": str(upload.size_bytes)}
    return state | ({"Upload-Sha256": upload.sha256} if upload.is_finished else {})


def _number(request: Request, name: str) -> int:
    """Return a header that is a size in bytes.

    Raises:
        InputError: It is missing or no such number.
    """
    text = request.headers.get(name.lower(), "")
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise InputError(f"The header {name} is {text[:40]!r}, not a number of bytes.")
    return int(text)


def _file_name(metadata: str) -> str:
    """Return the file's name out of tus metadata: `filename <base64>, key <base64>, ...`.

    Raises:
        InputError: There is none, or it is not base64 of UTF-8.
    """
    for pair in metadata.split(","):
        key, _, value = pair.strip().partition(" ")
        if key == "filename":
            try:
                return base64.b64decode(value, validate=True).decode("utf-8")
            except (binascii.Error, UnicodeDecodeError) as error:
                raise InputError(
                    "The file's name is not base64 of UTF-8.", "Rename the file."
                ) from error
    raise InputError("The upload has no file name.", "Send Upload-Metadata with a filename.")
