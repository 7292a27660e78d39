"""The base of every value that crosses a boundary: form, YAML, database, file."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen value that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
