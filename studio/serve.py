"""Serve the page, and keep a worker alive beside it."""

import logging
import socket
import threading
import time
from asyncio import CancelledError

import uvicorn

from studio.errors import InputError, MachineError, StudioError
from studio.services import workers
from studio.services.studio import Studio, open_studio
from studio.settings import LOOPBACK, Settings
from studio.terminal import err

WORKER_LOOK_SECONDS = 2.0


class _NotAboutClosing(logging.Filter):
    """Drops what uvicorn logs about browsers that were still connected when the page closed."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is about anything else."""
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, CancelledError) or "graceful shutdown" in record.getMessage())


def serve_page(settings: Settings) -> None:
    """Start the page, and see that a worker lives where none is started by itself.

    Returns when the page is closed.

    Raises:
        InputError: The address is not loopback, and nothing says that the port is behind it.
        MachineError: The port is in use, or the home folder cannot be written.
    """
    is_beyond = settings.host not in LOOPBACK
    if is_beyond and not settings.behind_loopback:
        raise InputError(
            f"The page cannot listen on {settings.host}: it has no login yet.",
            "Listen on 127.0.0.1, and reach it from elsewhere through `ssh -L`.",
        )
    check_port(settings.host, settings.port)
    studio = open_studio(settings)
    with workers.need_worker(studio):
        err.print("Delta Studio is starting ...")
        from studio.ui.app import build_app  # gradio alone takes 3 to 5 s to import

        config = uvicorn.Config(
            build_app(studio),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            timeout_graceful_shutdown=2,
        )
        logging.getLogger("uvicorn.error").addFilter(_NotAboutClosing())
        if settings.starts_worker:
            threading.Thread(target=_keep_worker, args=(studio,), daemon=True).start()
        if is_beyond:
            err.print(
                f"Delta Studio listens on {settings.host}:{settings.port} and lets everyone in who "
                "reaches it: that port must be published on loopback alone."
            )
        else:
            err.print(f"Delta Studio is open at http://{settings.host}:{settings.port}")
        uvicorn.Server(config).run()
    err.print("The page is closed; a run that trains goes on in the background.")


def _keep_worker(studio: Studio) -> None:
    while True:
        time.sleep(WORKER_LOOK_SECONDS)
        try:
            workers.ensure_worker(studio.home)
        except StudioError as error:
            err.print(str(error), markup=False)


def check_port(host: str, port: int) -> None:
    """See that a port is free.

    Raises:
        MachineError: It is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise MachineError(
                f"Port {port} on {host} is in use.",
                f"Choose another with --port, for instance --port {port + 1}, "
                "or close what listens there.",
            ) from error
