"""Presets and known models: data files under templates/, checked here."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, field_validator

from studio.domain.section import Section
from studio.domain.spec import JobSpec, parse_spec, spec_error, yaml_mapping
from studio.errors import InputError, NotFoundError

_T = TypeVar("_T", bound=Section)


class Needs(Section):
    """What a machine must have."""

    gpus: int = Field(ge=0, description="Cards of one run; 0 runs on a CPU.")
    gpu_memory_gib: float | None = Field(
        default=None, gt=0, description="Memory of each card, as the source states or computes it."
    )
    memory_basis: str = Field(
        default="", description="Where the figure comes from: measured by whom, or computed."
    )


class Preset(Section):
    """A named partial JobSpec with needs and source."""

    name: str = ""
    title: str
    summary: str
    order: int = Field(default=100, description="Place in the list; smaller is earlier.")
    needs: Needs
    source: str = Field(min_length=8, description="Link to where the choices come from.")
    not_yet: str = Field(default="", description="Why it cannot be launched yet.")
    instead: str = Field(default="", description="The Preset that can be, in its place.")
    spec: dict[str, Any]

    @field_validator("source")
    @classmethod
    def _is_link(cls, value: str) -> str:
        if not value.startswith("https://"):
            raise ValueError("source is a link that starts with https://")
        return value

    def job_spec(self, changes: Mapping[str, Any] | None = None) -> JobSpec:
        """Return the whole JobSpec: defaults, then the Preset, then `changes`.

        Raises:
            InputError: A field is wrong.
        """
        values = merge_values({**self.spec, "preset": self.name}, changes or {})
        return parse_spec(values)


class KnownModel(Section):
    """A base model whose configuration the studio knows without asking anyone.

    Attributes:
        id: What a ModelRef says, as in `Qwen/Qwen3.5-9B` or `tiny/qwen3.5`.
        variants: Further repositories with the same configuration.
        config: The published config.json, or its text part.
        chat_template: File under templates/chat, for models that the studio builds itself.
        vocab_size: Size of the tokenizer to train, for models that the studio builds itself.
    """

    id: str
    title: str
    source: str
    variants: tuple[str, ...] = ()
    config: dict[str, Any]
    chat_template: str | None = None
    vocab_size: int | None = Field(default=None, ge=300)

    @property
    def is_built_here(self) -> bool:
        """Whether the studio builds it with random weights."""
        return self.id.startswith("tiny/")


def merge_values(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge_values(below, value)
        else:
            merged[key] = value
    return merged


@lru_cache(maxsize=8)
def load_presets(folder: Path) -> dict[str, Preset]:
    """Load every Preset of a folder, by name, in the order of the list.

    Raises:
        InputError: A file is not a Preset.
    """
    presets = []
    for path in sorted(folder.glob("*.yaml")):
        presets.append(_load(path, Preset).model_copy(update={"name": path.stem}))
    return {preset.name: preset for preset in sorted(presets, key=lambda p: (p.order, p.name))}


@lru_cache(maxsize=8)
def load_models(folder: Path) -> dict[str, KnownModel]:
    """Load every KnownModel of a folder, by id.

    Raises:
        InputError: A file is not a KnownModel.
    """
    models = [_load(path, KnownModel) for path in sorted(folder.glob("*.yaml"))]
    return {model.id: model for model in models}


def find_preset(presets: Mapping[str, Preset], name: str) -> Preset:
    """Return the Preset of that name.

    Raises:
        NotFoundError: There is none.
    """
    if name not in presets:
        raise NotFoundError(
            f"There is no preset {name!r}.",
            f"Choose one of: {', '.join(presets)}.",
            field="preset",
        )
    return presets[name]


def _load(path: Path, kind: type[_T]) -> _T:
    try:
        return kind.model_validate(yaml_mapping(path.read_text(encoding="utf-8"), path.name))
    except ValidationError as error:
        wrong = spec_error(error, kind.__name__)
        raise InputError(f"{path.name}: {wrong.message}", wrong.hint) from error
