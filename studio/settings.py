"""Settings of one installation: the only reader of the environment (STUDIO_*)."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


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
    cpu_threads: int = Field(
        default=0,
        ge=0,
        description="Threads of one process on a CPU; 0 = half of the cores, at least two.",
    )

    def resolved_home(self) -> Path:
        """Return the home folder as an absolute path, `~` expanded."""
        return self.home.expanduser().resolve()
