"""The sections of a JobSpec that say how long is trained, in which portions, and what is watched."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from studio.domain.section import Section


class BatchSpec(Section):
    """How many examples make a step."""

    micro_batch_size: int = Field(
        default=1,
        ge=1,
        le=1024,
        title="Micro-batch (examples)",
        description="Examples in one forward and backward pass; memory grows with it. With "
        "packing: how many times the longest example fits.",
    )
    gradient_accumulation_steps: int = Field(
        default=4,
        ge=1,
        le=4096,
        title="Gradient accumulation (micro-batches)",
        description="Micro-batches of each card summed into one step; same result as a larger "
        "batch, less memory, more time.",
    )
    packing: bool = Field(
        default=False,
        title="Packing",
        description="Fills each micro-batch with whole examples instead of padding; a step then "
        "holds more of them. They never see each other: that is measured before the first step.",
    )


class TrainSpec(Section):
    """How long, and on what."""

    epochs: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        title="Epochs",
        description="Passes over the Dataset; small Datasets need more, too many memorise.",
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        title="Most steps",
        description="Ends the run earlier than the epochs would; empty sets no limit.",
    )
    seed: int = Field(
        default=42,
        ge=0,
        le=2**32 - 1,
        title="Seed",
        description="Same seed, same order of examples and same adapter at the start.",
    )
    recompute: Literal["auto", "all", "none"] = Field(
        default="auto",
        title="Recompute activations",
        description="Gradient checkpointing: computes activations twice instead of keeping them. "
        "auto does it for as many layers as the memory needs; all is a third slower.",
    )
    num_gpus: int = Field(
        default=0,
        ge=0,
        le=1024,
        title="GPUs",
        description="Cards that one run takes on each machine; 0 trains on the CPU (tiny models "
        "only). More than one shares the weights among them (FSDP2).",
    )
    num_nodes: int = Field(
        default=1,
        ge=1,
        le=1024,
        title="Machines",
        description="Machines that take part, each with that many GPUs; every one starts the run "
        "with torchrun.",
    )
    save_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        title="Checkpoint every (steps)",
        description="How often all that a run needs to go on is saved; empty leaves it to the "
        "minutes. It is always saved when a run stops or ends.",
    )
    save_minutes: float | None = Field(
        default=10.0,
        gt=0,
        le=100_000,
        title="Checkpoint at least every (minutes)",
        description="A crash, or a machine that fails, costs no more training than this (or one "
        "step, where that takes longer); empty saves by steps alone.",
    )
    keep_checkpoints: int = Field(
        default=2,
        ge=1,
        le=1000,
        title="Checkpoints kept",
        description="Older ones are removed; the best one by evaluation loss stays as well.",
    )
    accept_slow_kernels: bool = Field(
        default=False,
        title="Accept slow kernels",
        description="Trains on a GPU even where a fast kernel is missing and its plain "
        "replacement is many times slower.",
    )

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, values: Any) -> Any:
        """Read specs from before `recompute` had three values."""
        if not isinstance(values, Mapping) or "gradient_checkpointing" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "gradient_checkpointing"}
        return {"recompute": "all" if values["gradient_checkpointing"] else "none"} | rest


class EvalSpec(Section):
    """What is watched while a run trains."""

    every_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        title="Evaluate every (steps)",
        description="How often the loss on the evaluation examples is measured; empty measures "
        "it after each epoch.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        title="Early stopping (evaluations)",
        description="Ends the run when this many evaluations in a row were no better than the "
        "best one, whose checkpoint becomes the adapter; empty never does.",
    )
    prompts: tuple[str, ...] = Field(
        default=(),
        max_length=8,
        title="Sample prompts",
        description="Questions that the model answers at each evaluation, one a line, at most 8.",
    )
    prompt_tokens: int = Field(
        default=64,
        ge=1,
        le=2048,
        title="Longest sample (tokens)",
        description="Where a sample reply is cut off.",
    )

    @field_validator("prompts", mode="before")
    @classmethod
    def _from_lines(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.splitlines()
        if not isinstance(value, list | tuple):
            return value
        lines = (" ".join(str(line).split()) for line in value)
        return tuple(line for line in lines if line)
