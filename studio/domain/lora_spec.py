"""The LoRA section of a JobSpec: which layers the Adapter changes, and how."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from studio.domain.section import Section
from studio.domain.targets import TargetGroup


class LoraSpec(Section):
    """The Adapter."""

    rank: int = Field(
        default=16,
        ge=1,
        le=1024,
        title="Rank",
        description="Inner size of the adapter; trainable parameters grow in proportion.",
    )
    alpha: float = Field(
        default=32.0,
        gt=0,
        le=4096,
        title="Alpha",
        description="Strength of the adapter: its output is scaled by alpha / rank.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        title="Dropout",
        description="Share of adapter inputs dropped in training; 0 is usual for QLoRA.",
    )
    targets: tuple[TargetGroup, ...] = Field(
        default=(TargetGroup.ATTENTION, TargetGroup.DELTA_NET),
        title="LoRA targets",
        description="Groups of layers that the adapter may change.",
    )
    modules: tuple[str, ...] = Field(
        default=(),
        validate_default=True,
        max_length=64,
        title="Further layers",
        description="Names of layers beside the groups, with commas between them, as in "
        "self_attn.v_proj or layers.3.mlp.down_proj.",
    )
    expert_rank: Literal["same", "divided"] = Field(
        default="same",
        title="Rank of the experts",
        description="divided gives each routed expert the rank divided by the experts that a "
        "token uses: a tenth of the memory, and each token still meets the whole rank.",
    )
    rslora: bool = Field(
        default=False,
        title="Rank-stabilised scaling",
        description="Scales by alpha / sqrt(rank), so that a large rank learns as fast as a "
        "small one (rsLoRA).",
    )
    dora: bool = Field(
        default=False,
        title="DoRA",
        description="Learns the length of each weight row apart from its direction; slower. "
        "Not for routed experts, the router and embeddings.",
    )

    @field_validator("targets")
    @classmethod
    def _unique_in_order(cls, value: tuple[TargetGroup, ...]) -> tuple[TargetGroup, ...]:
        return tuple(group for group in TargetGroup if group in value)

    @field_validator("modules", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, list | tuple):
            return value
        # A comma stands between names, so none holds one.
        names = (part for name in value for part in str(name).split(","))
        return tuple(name.strip() for name in names if name.strip())

    @field_validator("modules")
    @classmethod
    def _has_targets(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value and info.data.get("targets") == ():
            raise ValueError("choose a group of targets, or name a layer here")
        return value
