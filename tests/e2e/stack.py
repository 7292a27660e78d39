"""The services of docker-compose.yml as processes of this machine.

Command, environment and health check of each are read from the file. What is replaced is only what
a container has for itself: its folders, its host names, its ports, and where its secrets lie.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from studio.disk import Home
from tests.compose import ROOT, instructions, plain, read_compose
from tests.fakes import make_home
from tests.servers import find_program, free_port, postgres_server

PATIENCE_SECONDS = 120.0
# An address of loopback that `studio up` does not know as one: so the page goes the way that it
# goes in its container, and yet nobody outside of this machine reaches the test.
BEYOND = "127.1"


@dataclass(kw_only=True)
class Stack:
    """All services of the file, in a folder.

    Attributes:
        folder: Secrets, volumes and logs lie here.
        home: What page and worker see as /data.
        ports: Port of this machine for each host of the file.
    """

    folder: Path
    home: Home
    ports: dict[str, int]
    services: dict[str, Any] = field(default_factory=lambda: read_compose()["services"])
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def secret(self, name: str) -> str:
        """Return a password."""
        return (self.folder / "secrets" / f"{name}_password.txt").read_text()

    def log(self, name: str) -> Path:
        """Return the file with what a service has said."""
        return self.folder / f"{name}.log"

    def local(self, name: str, text: str) -> str:
        """Return a text of a service's with the places of this machine."""
        data = {"web": self.home.path, "worker": self.home.path}.get(name, self.folder / name)
        text = re.sub(r"/run/secrets/(\w+)", rf"{self.folder}/secrets/\1.txt", plain(text))
        text = re.sub(r"(?<![\w/])/data\b", str(data), text)
        text = re.sub(r"(?<![\w/])/cache\b", str(self.folder / "cache"), text)
        text = re.sub(r"\b(redis|postgres):\d+", lambda m: f"127.0.0.1:{self.ports[m[1]]}", text)
        return BEYOND if text == "0.0.0.0" else text

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of a service: the system's, the image's, its own."""
        image = [pair for kind, rest in instructions() if kind == "ENV" for pair in rest.split()]
        given = dict(pair.split("=", maxsplit=1) for pair in image)
        given |= self.services[name].get("environment", {})
        mine = {key: self.local(name, value) for key, value in given.items()}
        system = {"PATH": os.getenv("PATH", os.defpath), "HOME": str(self.folder)}
        return {**system, "STUDIO_PORT": str(self.ports["web"]), **mine}

    def command(self, name: str, words: list[str] | None = None) -> list[str]:
        """Return a command of a service; its own when none is given."""
        program, *rest = self.services[name]["command"] if words is None else words
        rest = [self.local(name, word) for word in rest]
        known = {
            "python": [sys.executable],
            "studio": [sys.executable, "-m", "studio"],
            "sh": ["sh"],
        }
        return [*(known.get(program) or [find_program(program, program)]), *rest]

    def start(self, name: str, command: list[str] | None = None, user: str | None = None) -> None:
        """Start a service and wait until its health check is content."""
        with self.log(name).open("ab") as output:
            self.processes[name] = subprocess.Popen(
                command or self.command(name),
                cwd=ROOT if user is None else "/",
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        self.wait_for(name, lambda: self.is_well(name))

    def wait_for(self, name: str, there: Callable[[], bool]) -> None:
        """Wait for something that a service does."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not there():
            code = self.processes[name].poll()
            assert code is None, f"{name} ended with {code}: {self.log(name).read_text()[-3000:]}"
            assert time.monotonic() < deadline, self.log(name).read_text()[-3000:]
            time.sleep(0.2)

    def is_well(self, name: str) -> bool:
        """Ask the health check of a service, as docker would."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        if kind == "CMD-SHELL":
            port = self.ports[name]
            text = self.local(name, words[0]).replace("redis-cli", f"redis-cli -p {port}")
            command = ["sh", "-c", text]
        else:
            command = self.command(name, words)
            command += [f"--port={self.ports[name]}"] if name == "postgres" else []
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment(name), capture_output=True, check=False
        )
        return done.returncode == 0

    def stop(self, name: str) -> int:
        """Ask a service to end, as docker does, and return its exit code."""
        process = self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
        grace = float(self.services[name]["stop_grace_period"].removesuffix("s"))
        try:
            return process.wait(grace)
        finally:
            process.kill()
            process.wait()

    def connect(self) -> psycopg.Connection[Any]:
        """Connect to PostgreSQL as page and worker do."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.ports["postgres"],
            user="studio",
            dbname="studio",
            password=self.secret("postgres"),
            autocommit=True,
        )


@contextmanager
def running(folder: Path, verdicts: Path) -> Iterator[Stack]:
    """Start all services of the file, those first that others wait for."""
    for name in ("redis", "postgres", "cache/tmp"):
        (folder / name).mkdir(parents=True)
    make = ["make", "--silent", "--file", str(ROOT / "Makefile"), "secrets"]
    subprocess.run(make, cwd=folder, check=True)
    ports = {name: free_port() for name in ("web", "redis")}
    stack = Stack(folder=folder, home=make_home(folder / "home", verdicts), ports=ports)
    with ExitStack() as after:
        after.callback(lambda: [stack.stop(name) for name in reversed(list(stack.processes))])
        _start_redis(stack)
        _start_postgres(stack, after)
        for name in ("web", "worker"):
            assert not stack.is_well(name)
            stack.start(name)
        yield stack


def _start_redis(stack: Stack) -> None:
    command = stack.command("redis")
    listening = f"bind 127.0.0.1\nport {stack.ports['redis']}\n"
    assert command[-1].count("\nSETTINGS") == 1
    command[-1] = command[-1].replace("\nSETTINGS", f"\n{listening}SETTINGS")
    stack.start("redis", command)


def _start_postgres(stack: Stack, after: ExitStack) -> None:
    """Start PostgreSQL with the file's command, after what its image does at a first start."""
    server = after.enter_context(postgres_server(stack.folder / "postgres"))
    stack.ports["postgres"] = server.port
    server.create_database("studio")
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        # The image's first start sets the password, and asks everyone for it.
        connection.execute(f"ALTER USER studio PASSWORD '{stack.secret('postgres')}'")
    rule = server.data / "pg_hba.conf"
    rule.write_text("host all all 127.0.0.1/32 scram-sha-256\n")
    server.stop()
    places = {
        "data_directory": server.data,
        "listen_addresses": "127.0.0.1",
        "port": server.port,
        "unix_socket_directories": "",
    }
    command = [*stack.command("postgres"), "-D", str(server.data)]
    command += [word for key, value in places.items() for word in ("-c", f"{key}={value}")]
    stack.start("postgres", command, user="postgres" if os.geteuid() == 0 else None)


@contextmanager
def overheard(stack: Stack) -> Iterator[Path]:
    """Write down every command that Redis is given while the block runs."""
    heard = stack.folder / "heard.txt"
    environment = {"REDISCLI_AUTH": stack.secret("redis")}
    with heard.open("wb") as output:
        listener = subprocess.Popen(
            [find_program("redis-cli", "redis-tools"), "-p", str(stack.ports["redis"]), "monitor"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            stack.wait_for("redis", lambda: heard.read_text().startswith("OK"))
            yield heard
        finally:
            listener.kill()
            listener.wait()
