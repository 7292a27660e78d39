"""Real Redis and PostgreSQL servers of a test: on loopback, on free ports, gone afterwards.

The programs are Debian's (`.ci/system-packages` installs them). The daemons that Debian starts
by itself are not touched: these here have folders and ports of their own.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_SECONDS = 60.0
_USER = "studio"


class ProgramMissingError(Exception):
    """A server cannot be started because its program is not installed."""


def find_program(name: str, package: str) -> str:
    """Return the path of a program; PostgreSQL's lie outside of PATH on Debian.

    Raises:
        ProgramMissingError: It is not installed.
    """
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    newest_first = sorted(versions, key=lambda folder: int(folder.parent.name), reverse=True)
    path = os.pathsep.join([*map(str, newest_first), os.getenv("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise ProgramMissingError(
            f"{name} is missing: install the package {package}, or run .ci/system-packages."
        )
    return found


def free_port() -> int:
    """Return a port of loopback that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(kw_only=True)
class RedisServer:
    """One Redis that can be killed and started again on the same port.

    Attributes:
        is_kept: Whether what it holds is written to disk and outlives a kill (append-only file).
    """

    folder: Path
    port: int
    password: str = ""
    is_kept: bool = False
    process: subprocess.Popen[bytes] = field(init=False, repr=False)

    @property
    def url(self) -> str:
        """What STUDIO_BROKER_URL is set to."""
        before = f":{self.password}@" if self.password else ""
        return f"redis://{before}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = {
            "--bind": "127.0.0.1",
            "--port": str(self.port),
            "--dir": str(self.folder),
            "--save": "",
            "--appendonly": "yes" if self.is_kept else "no",
            "--requirepass": self.password,
        }
        command = [find_program("redis-server", "redis-server")]
        command += [word for pair in options.items() for word in pair]
        self.process = _start(command, self.folder / "redis.log", self._answers)

    def kill(self) -> None:
        """End it as a power cut would (kill -9)."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it as an administrator would."""
        self.process.terminate()
        self.process.wait(PATIENCE_SECONDS)

    def ask(self, *words: str) -> str:
        """Send one command and return what redis-cli prints, without the last line end."""
        command = [find_program("redis-cli", "redis-tools"), "-p", str(self.port)]
        command += ["--no-auth-warning", "-a", self.password] if self.password else []
        answer = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
        return answer.stdout.rstrip("\n")

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                # With a password it answers NOAUTH; while it reads its file, LOADING.
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


@dataclass(kw_only=True)
class PostgresServer:
    """One PostgreSQL that can be killed and started again with what it had committed."""

    folder: Path
    data: Path
    port: int
    process: subprocess.Popen[bytes] = field(init=False, repr=False)

    @property
    def url(self) -> str:
        """SQLAlchemy's URL of the database that is there from the beginning."""
        return self.url_of("postgres")

    def url_of(self, name: str) -> str:
        """Return SQLAlchemy's URL of a database."""
        return f"postgresql+psycopg://{_USER}@127.0.0.1:{self.port}/{name}"

    def create_database(self, name: str) -> str:
        """Create an empty database and return its URL."""
        self._ask("createdb", "--maintenance-db=postgres", name)
        return self.url_of(name)

    def drop_database(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        self._ask("dropdb", "--maintenance-db=postgres", "--force", name)

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",  # of a killed process nothing is lost; only of a dead machine
            "full_page_writes": "off",
        }
        command = [find_program("postgres", "postgresql"), "-D", str(self.data)]
        command += [f"--{name}={value}" for name, value in options.items()]
        self.process = _start(command, self.folder / "postgres.log", self._answers, as_user=True)

    def kill(self) -> None:
        """End it as a power cut would (kill -9); its children see that and end by themselves."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it at once but in order: connections are cut (SIGINT, PostgreSQL's fast shutdown)."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE_SECONDS)

    def _answers(self) -> bool:
        command = [find_program("pg_isready", "postgresql-client"), "--quiet"]
        command += ["--host=127.0.0.1", f"--port={self.port}", "--dbname=postgres"]
        return subprocess.run(command, check=False).returncode == 0

    def _ask(self, program: str, *arguments: str) -> None:
        command = [find_program(program, "postgresql-client"), "--host=127.0.0.1"]
        command += [f"--port={self.port}", f"--username={_USER}", "--no-password", *arguments]
        subprocess.run(command, check=True)


@contextmanager
def redis_server(
    folder: Path, port: int | None = None, *, password: str = "", is_kept: bool = False
) -> Iterator[RedisServer]:
    """Run a Redis while the block runs.

    Args:
        folder: Where its log and its file lie.
        port: Where it listens; None = a free port.
        password: What it asks for; empty = nothing.
        is_kept: Whether what it holds outlives a kill.

    Raises:
        ProgramMissingError: Redis is not installed.
    """
    server = RedisServer(
        folder=folder, port=port or free_port(), password=password, is_kept=is_kept
    )
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def postgres_server(folder: Path) -> Iterator[PostgresServer]:
    """Run a PostgreSQL while the block runs.

    It refuses to run as root, so that for root its files belong to the system user `postgres`
    and lie in a folder which that user can reach; pytest's folders are closed to others.

    Args:
        folder: Where its log lies.

    Raises:
        ProgramMissingError: PostgreSQL is not installed.
    """
    initdb = find_program("initdb", "postgresql")
    home = Path(tempfile.mkdtemp(prefix="postgres-of-a-test-"))
    if os.geteuid() == 0:
        shutil.chown(home, "postgres", "postgres")
    server = PostgresServer(folder=folder, data=home / "data", port=free_port())
    command = [initdb, "--pgdata", str(server.data), "--username", _USER, "--auth=trust"]
    command += ["--encoding=UTF8", "--locale=C", "--no-sync"]
    try:
        with (folder / "initdb.log").open("wb") as log:
            _spawn(command, log.fileno(), as_user=True).wait(PATIENCE_SECONDS)
        server.start()
        try:
            yield server
        finally:
            server.stop()  # a killed one leaves its shared memory behind
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _start(
    command: Sequence[str], log: Path, answers: Callable[[], bool], *, as_user: bool = False
) -> subprocess.Popen[bytes]:
    """Start a server and wait until it answers.

    One that ends is started again until patience ends: for a moment after a kill, PostgreSQL's
    children still hold its memory, and it refuses.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    with log.open("ab") as output:
        process = _spawn(command, output.fileno(), as_user=as_user)
        while not answers() or process.poll() is not None:
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise TimeoutError(f"{command[0]} does not answer: {log.read_text()[-2000:]}")
            if process.poll() is not None:
                process = _spawn(command, output.fileno(), as_user=as_user)
            time.sleep(0.02)
    return process


def _spawn(command: Sequence[str], output: int, *, as_user: bool) -> subprocess.Popen[bytes]:
    """Start a program; with `as_user` and for root, as the system user `postgres`."""
    account = "postgres" if as_user and os.geteuid() == 0 else None
    return subprocess.Popen(
        command,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C at the terminal is for pytest, which ends it in order
        user=account,
        group=account,
        extra_groups=None if account is None else [],
    )
