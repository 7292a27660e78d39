"""Settings of one installation: the only reader of the environment (STUDIO_*)."""

import os
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Settings(BaseSettings):
    """What may differ between two machines that run the same code."""

    # Addresses hold passwords, so that an error never shows what was given.
    model_config = SettingsConfigDict(
        env_prefix="STUDIO_", frozen=True, extra="ignore", hide_input_in_errors=True
    )

    home: Path = Field(
        default=Path("~/.delta-studio"),
        description="Folder of everything that the studio keeps: database, datasets, runs, models.",
    )
    host: str = Field(default="127.0.0.1", description="Address that the page listens on.")
    port: int = Field(default=7860, ge=1, le=65535, description="Port that the page listens on.")
    behind_loopback: bool = Field(
        default=False,
        description="Whether the page may listen beyond loopback although it has no login: whoever "
        "reaches the port is let in. Set it only where the port is published on loopback alone, as "
        "docker-compose.yml does.",
    )
    chat_host: str = Field(
        default="127.0.0.1",
        description="Address that chats listen on, on the machine of their worker; a page on another "
        "machine reaches them by that machine's name. Each chat asks for a token of its own.",
    )
    embedded_worker: bool | None = Field(
        default=None,
        description="Whether the page and the commands start a worker when none lives; when not "
        "set, only while there is no broker_url, since with one workers are started by themselves.",
    )
    broker_url: str = Field(
        default="",
        repr=False,
        description="Address of a Redis that carries the bells, for workers on several machines; "
        "empty = a folder in the home folder.",
    )
    broker_password_file: Path | None = Field(
        default=None, description="File with the password of broker_url; its last line end is cut."
    )
    database_url: str = Field(
        default="",
        repr=False,
        description="Address of a PostgreSQL that keeps the rows, for workers on several machines; "
        "empty = SQLite in the home folder.",
    )
    database_password_file: Path | None = Field(
        default=None,
        description="File with the password of database_url; its last line end is cut.",
    )
    files_url: str = Field(
        default="",
        repr=False,
        description="Folder of an object store, as s3://bucket/studio or file:///mnt/studio, "
        "through which machines that share no home folder exchange datasets, checkpoints, adapters "
        "and merges; empty = all workers see one home folder.",
    )
    max_upload_bytes: int = Field(
        default=2 * 2**30, gt=0, description="Largest file that an upload may have, in bytes."
    )
    min_free_bytes: int = Field(
        default=2**30,
        ge=0,
        description="Room that uploads and downloads leave free on the disk, in bytes. 1 GiB keeps "
        "the database and a checkpoint of a small run writable; more would refuse every upload on "
        "the 20 GB disks of small machines.",
    )
    allow_server_paths: bool | None = Field(
        default=None,
        description="Whether the page may read files of this machine by their path; when not "
        "set, only while the page listens on loopback.",
    )
    server_path_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(),
        description="Folders that files of this machine may be read from, separated as in PATH; "
        "empty = any folder.",
    )
    allow_private_urls: bool = Field(
        default=False,
        description="Whether URLs may lead to loopback, private and link-local addresses; such a "
        "URL lets whoever uses the page reach services that only this machine can reach.",
    )
    allow_http: bool = Field(
        default=False,
        description="Whether URLs may begin with http://, which lets anyone on the way change "
        "what arrives.",
    )
    proxy: str = Field(
        default="", description="URL of the proxy for downloads from URLs; empty = none."
    )
    hub_endpoint: str = Field(
        default="", description="Address of a mirror of the Hugging Face hub; empty = the hub."
    )
    new_database: bool = Field(
        default=False,
        description="Whether an empty database may begin where the old one was lost; runs, merges "
        "and chats that lie there are moved aside.",
    )
    cpu_threads: int = Field(
        default=0,
        ge=0,
        description="Threads of one process on a CPU; 0 = half of the cores, at least two.",
    )

    hang_minutes: float = Field(
        default=30.0,
        gt=0,
        description="How long a step of a run may take before its trainer is taken for hung, ended "
        "and started again from its latest checkpoint; loading and saving may take eight times as "
        "long.",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_passwords(cls, values: dict[str, Any]) -> dict[str, Any]:
        found = dict(values)
        for name in ("broker", "database"):
            url, file = found.get(f"{name}_url"), found.get(f"{name}_password_file")
            if url and file:
                found[f"{name}_url"] = with_password(str(url), Path(file))
        return found

    @field_validator("broker_url")
    @classmethod
    def _a_redis(cls, url: str) -> str:
        if url and not _is_redis(url):
            raise ValueError(
                "it must begin with redis:// or rediss:// (with TLS) and name a host, as "
                "redis://:password@host:6379/0, where signs in a password are percent-encoded "
                "(a slash as %2F); empty = a folder in the home folder"
            )
        return url

    @field_validator("database_url")
    @classmethod
    def _a_postgres(cls, url: str) -> str:
        known = url.startswith(("postgresql://", "postgresql+psycopg://"))
        if url and not (known and url.count("@") <= 1):
            raise ValueError(
                "it must be postgresql://USER:PASSWORD@HOST:PORT/NAME, where signs in a password "
                "are percent-encoded (@ as %40, / as %2F); empty = SQLite in the home folder"
            )
        return url

    @field_validator("server_path_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(Path(part) for part in value.split(os.pathsep) if part)
        return value

    @field_validator("server_path_roots")
    @classmethod
    def _absolute(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        for root in roots:
            if not root.expanduser().is_absolute():
                raise ValueError(
                    f"{str(root)!r} is not absolute; give it from the root, as in PATH"
                )
        return roots

    @property
    def server_paths_allowed(self) -> bool:
        """Whether the page may read files of this machine by their path."""
        if self.allow_server_paths is None:
            return self.host in LOOPBACK
        return self.allow_server_paths

    @property
    def starts_worker(self) -> bool:
        """Whether the page and the commands start a worker when none lives."""
        return not self.broker_url if self.embedded_worker is None else self.embedded_worker

    def resolved_home(self) -> Path:
        """Return the home folder as an absolute path, `~` expanded."""
        return self.home.expanduser().resolve()


def with_password(url: str, file: Path) -> str:
    """Return the URL of a server with the password that a file holds.

    Raises:
        ValueError: The file cannot be read or is empty, or the URL has a password already.
    """
    try:
        password = file.expanduser().read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the password file {file} cannot be read: {error}") from error
    if not password:
        raise ValueError(f"the password file {file} is empty")
    parts = urlsplit(url)
    if parts.password is not None:
        raise ValueError(f"there is a password in the URL already, and another in {file}")
    user, _, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{place}").geturl()


def _is_redis(url: str) -> bool:
    """Tell whether a URL leads to a Redis; in a wrong one even the parts may hold a password."""
    try:
        parts = urlsplit(url)
        has_place = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    number = parts.path.removeprefix("/") or "0"
    is_database = number.isascii() and number.isdigit() and not parts.fragment
    # kombu takes a semicolon for the beginning of another address.
    is_one = ";" not in url
    return parts.scheme in {"redis", "rediss"} and has_place and is_database and is_one
