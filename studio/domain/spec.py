"""JobSpec: the complete description of one training, enough to repeat it.

Sections nest at most ten fields each. Titles and descriptions are what the page and
`studio run` show, so each says the unit and the consequence.
"""

import json
from collections.abc import Mapping
from reprlib import Repr
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from studio.domain.data_spec import DataSpec
from studio.domain.lora_spec import LoraSpec
from studio.domain.section import Section
from studio.domain.train_spec import BatchSpec, EvalSpec, TrainSpec
from studio.errors import InputError

SPEC_VERSION: Literal[1] = 1
# Wrong values are quoted, but a page of them helps nobody.
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class ModelRef(Section):
    """Base weights."""

    id: str = Field(
        default="tiny/qwen3.5",
        min_length=1,
        max_length=300,
        title="Base model",
        description="Hub id, path of a Hugging Face folder, or tiny/NAME for a model that the "
        "studio builds itself.",
    )
    revision: str | None = Field(
        default=None,
        max_length=300,
        title="Revision",
        description="Branch, tag or commit of a hub model; empty takes the newest.",
    )

    @field_validator("revision", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value


class OptimSpec(Section):
    """How the weights move."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "ademamix_8bit"] = Field(
        default="adamw",
        title="Optimizer",
        description="The 8-bit forms keep their state in a quarter of the memory; paged moves it "
        "to the machine's memory when the card is full.",
    )
    learning_rate: float = Field(
        default=2e-4,
        gt=0,
        le=1,
        title="Learning rate",
        description="Size of a step at its peak; 2e-4 is usual for LoRA. Too high diverges, "
        "too low learns nothing.",
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        title="Schedule",
        description="How the learning rate falls after the warm-up; wsd stays at its peak and "
        "falls at the end.",
    )
    warmup_ratio: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        title="Warm-up (share of steps)",
        description="Share of all steps in which the learning rate rises from zero.",
    )
    decay_ratio: float = Field(
        default=0.2,
        gt=0,
        le=1,
        title="Decay (share of steps)",
        description="Share of all steps in which the learning rate of wsd falls to zero.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=1,
        title="Weight decay",
        description="Pull of the adapter towards zero at each step.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        title="Largest gradient norm",
        description="A larger gradient is scaled down to it before the step.",
    )
    loraplus_ratio: float = Field(
        default=1.0,
        ge=1,
        le=1000,
        title="LoRA+ ratio",
        description="How much faster B learns than A; 1 is plain LoRA, 16 is usual for LoRA+.",
    )
    neftune_alpha: float = Field(
        default=0.0,
        ge=0,
        le=100,
        title="NEFTune noise",
        description="Noise on the embeddings in training, against memorising; 0 is none, "
        "5 is usual.",
    )


class JobSpec(Section):
    """Complete frozen description of one training."""

    version: Literal[1] = Field(
        default=SPEC_VERSION,
        title="Format version",
        description="Which form of JobSpec this is; there is one so far.",
    )
    name: str = Field(
        default="", max_length=120, title="Name", description="Your name for the run."
    )
    preset: str = Field(
        default="", max_length=120, title="Preset", description="Preset that it started from."
    )
    method: Literal["qlora", "lora", "auto", "full"] = Field(
        default="qlora",
        title="Method",
        description="qlora keeps the base in 4 bits (NF4), lora in 16 bits, auto in 16 bits where "
        "the card has room; full trains all weights.",
    )
    model: ModelRef = Field(default_factory=ModelRef, title="Model")
    data: DataSpec = Field(default_factory=DataSpec, title="Data")
    lora: LoraSpec = Field(default_factory=LoraSpec, title="LoRA")
    batch: BatchSpec = Field(default_factory=BatchSpec, title="Batch")
    optim: OptimSpec = Field(default_factory=OptimSpec, title="Optimizer")
    train: TrainSpec = Field(default_factory=TrainSpec, title="Training")
    eval: EvalSpec = Field(default_factory=EvalSpec, title="Evaluation")

    @field_validator("name")
    @classmethod
    def _one_line(cls, value: str) -> str:
        return " ".join("".join(c for c in value if c.isprintable()).split())


def parse_spec(values: Mapping[str, Any]) -> JobSpec:
    """Check values from a form, a YAML file or a database row.

    Args:
        values: Nested mapping in the shape of JobSpec; missing fields take their defaults.

    Returns:
        The JobSpec.

    Raises:
        InputError: One or more fields are wrong; all of them are named.
    """
    try:
        return JobSpec.model_validate(values)
    except ValidationError as error:
        raise spec_error(error) from error


def spec_error(error: ValidationError, what: str = "JobSpec") -> InputError:
    """Say what a ValidationError found, in sentences: field, value, what is expected.

    Args:
        error: What pydantic found.
        what: What was being read, as in "JobSpec".
    """
    found = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            found.append(f"{field} is not a field of a {what}")
            continue
        expected = item["msg"].removeprefix("Value error, ")
        value = _SHORT.repr(item["input"])
        found.append(f"{field} is {value}: {expected[:1].lower()}{expected[1:]}")
    first = ".".join(str(part) for part in error.errors()[0]["loc"])
    return InputError("; ".join(found) + ".", "Correct the fields named here.", field=first)


def spec_to_yaml(spec: JobSpec) -> str:
    """Return the spec as YAML, fields in the order of the form."""
    values = spec.model_dump(mode="json")
    # PyYAML 6.0 writes a next-line character (U+0085) bare and reads it back as a line break, so
    # text with characters that cannot be printed is escaped.
    is_plain = json.dumps(values, ensure_ascii=False).isprintable()
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=is_plain)


def spec_from_yaml(text: str) -> JobSpec:
    """Parse a spec from YAML.

    Raises:
        InputError: The text is not YAML, not a mapping, or a field is wrong.
    """
    return parse_spec(yaml_mapping(text, "The spec"))


def yaml_mapping(text: str, what: str) -> dict[str, Any]:
    """Parse YAML text that must hold a mapping.

    Args:
        text: The YAML text.
        what: What it is, as the subject of an error sentence.

    Raises:
        InputError: The text is not YAML, not a mapping, or uses aliases.
    """
    try:
        # A few aliases of aliases unfold to gigabytes when a message quotes them.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise InputError(f"{what} uses YAML aliases (*name).", "Write the values out.")
        values = yaml.safe_load(text)
    # ValueError: a date that does not exist, https://github.com/yaml/pyyaml/issues/382
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first_line = " ".join(str(error).split())[:200]
        raise InputError(f"{what} is not YAML: {first_line}.", "Correct the line named.") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{what} holds {type(values).__name__}, not fields with values.",
            "Write one `field: value` a line, as in the YAML that the Train page shows.",
        )
    return values
