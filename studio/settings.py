"""Settings of one installation: the only reader of the environment (STUDIO_*)."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Settings(BaseSettings):
    """What may differ between two machines that run the same code."""

    model_config = SettingsConfigDict(env_prefix="STUDIO_", frozen=True, extra="ignore")

    home: Path = Field(
        default=Path("~/.delta-studio"),
        description="Folder of everything that the studio keeps: database, datasets, runs, models.",
    )
    host: str = Field(default="127.0.0.1", description="Address that the page listens on.")
    port: int = Field(default=7860, ge=1, le=65535, description="Port that the page listens on.")
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
    cpu_threads: int = Field(
        default=0,
        ge=0,
        description="Threads of one process on a CPU; 0 = half of the cores, at least two.",
    )

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

    def resolved_home(self) -> Path:
        """Return the home folder as an absolute path, `~` expanded."""
        return self.home.expanduser().resolve()
