"""Serve one Chat: a loaded base and what was trained on it, over HTTP, on loopback by default.

    python -m workers.chat CHAT_DIR

CHAT_DIR holds order.json (ChatOrder); it receives ready.json {"port", "pid", "models"} as soon as
requests are answered, and stage.json while loading (studio/disk.py). The protocol is OpenAI's,
see workers/chat_api.py. SIGTERM ends the process within two seconds, at whatever step it is;
ready.json is gone then. A failure to start: error.json and exit code as in workers/process.py.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from studio.disk import OrderFolder, write_whole
from studio.domain.orders import ChatOrder, parse_order
from studio.errors import EngineError
from workers.chat_api import build_app
from workers.process import run_order, tell_stage
from workers.speakers import Speakers, load_speakers

# Replies end at their next step. uvicorn cuts off those whose step takes longer than this.
_GRACE_SECONDS = 1


class _Server(uvicorn.Server):
    """Ends replies under way as soon as a signal asks the process to end."""

    def __init__(self, config: uvicorn.Config, speakers: Speakers) -> None:
        super().__init__(config)
        self._speakers = speakers

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._speakers.close()
        super().handle_exit(sig, frame)


def main() -> int:
    """Carry out the order that the command line names.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m workers.chat", description="Serve one Chat.")
    parser.add_argument("chat_dir", type=Path, help="folder with order.json")
    return run_order(OrderFolder(path=parser.parse_args().chat_dir.resolve()), serve)


def serve(folder: OrderFolder) -> None:
    """Load the models and answer requests until SIGTERM.

    Args:
        folder: Folder of the order.

    Raises:
        InputError: The order or the base model is wrong.
        EngineError: Something cannot be loaded, or the server does not start.
    """
    folder.ready.unlink(missing_ok=True)
    order = parse_order(ChatOrder, folder.order.read_text(encoding="utf-8"))
    tell_stage(folder, "loading", order.model.id, 0.0)
    speakers = load_speakers(order, folder.home)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((order.host, 0))
        # Before ready.json is written, so that whoever reads it can connect.
        listener.listen()
        lifespan = _announced(folder, listener.getsockname()[1], speakers)
        config = uvicorn.Config(
            build_app(speakers, token=order.token, lifespan=lifespan),
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        server = _Server(config, speakers)
        server.run(sockets=[listener])
        if not server.started:
            raise EngineError("The HTTP server of the Chat did not start.", "See log.txt.")


@asynccontextmanager
async def _announced(folder: OrderFolder, port: int, speakers: Speakers) -> AsyncIterator[None]:
    """Say where the process listens as long as it does."""
    ready = {"port": port, "pid": os.getpid(), "models": list(speakers.names)}
    write_whole(folder.ready, json.dumps(ready))
    tell_stage(folder, "ready", ", ".join(speakers.names), 1.0)
    try:
        yield
    finally:
        folder.ready.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
