"""Serve an application from a thread of the test."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn


def serve(app: Any) -> Iterator[str]:
    """Serve an application as the studio does, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
