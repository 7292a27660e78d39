"""Tell whether the page or the worker of this machine is well: `python -m studio.health page`.

docker compose asks it several times a minute, so it loads neither the page nor the database.
Exit codes: 0 well, 1 not.
"""

import argparse
import http.client
import sys
from collections.abc import Sequence
from pathlib import Path

from studio.disk import Home
from studio.settings import Settings

ANSWER_SECONDS = 8.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at one process of this machine and say in one line what is wrong with it."""
    parser = argparse.ArgumentParser(prog="python -m studio.health", description=__doc__)
    parser.add_argument("process", choices=("page", "worker"), help="which process")
    parser.add_argument("--port", type=int, help="port of the page, where not STUDIO_PORT")
    options = parser.parse_args(arguments)
    settings = Settings()
    if options.process == "page":
        trouble = page_trouble(options.port or settings.port)
    else:
        trouble = worker_trouble(Home(path=settings.resolved_home()))
    if trouble:
        sys.stderr.write(trouble + "\n")
    return 1 if trouble else 0


def page_trouble(port: int) -> str:
    """Return why the page does not answer on loopback; empty when it does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"The page does not answer on port {port}: {error}."
    finally:
        connection.close()
    return "" if status == http.client.OK else f"The page answers with code {status}."


def worker_trouble(home: Home) -> str:
    """Return why no worker of this machine serves a home folder; empty when one does.

    Workers of several machines, or containers, may serve it; it is their own that each asks for.
    """
    if any(_is_held_here(file) for file in home.workers.glob("*.lock")):
        return ""
    return f"No worker of this machine serves {home.path}."


def _is_held_here(lock: Path) -> bool:
    """Tell whether the process that a worker's lock file names lives here and holds it open.

    To try the lock would say no more, and it is another machine's as well as ours.
    """
    try:
        pid = int(lock.read_text(encoding="utf-8").split()[0])
        return any(link.samefile(lock) for link in Path(f"/proc/{pid}/fd").iterdir())
    except (OSError, ValueError, IndexError):
        return False


if __name__ == "__main__":
    sys.exit(main())
