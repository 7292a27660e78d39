"""Tables. Times are seconds since 1970 in UTC; JSON columns hold values that domain models check."""

from typing import Any, ClassVar

from sqlalchemy import JSON, CheckConstraint, Double, ForeignKey, Index
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from studio.domain.conversation import Kind
from studio.domain.run import RunState


class Base(DeclarativeBase):
    """Base of all rows."""

    type_annotation_map: ClassVar = {dict[str, Any]: JSON, list[str]: JSON, float: Double}


class DatasetRow(Base):
    """An immutable Dataset; its records lie in a file named by `sha256`.

    Attributes:
        num_conversations: Number of records, of whatever kind.
        parent_id: The Dataset that it is a version of, as long as that is there.
        source: How it came: `type` (upload, path, hub, url, version, example), `name`, `sha256` of
            the bytes it was read from, and what else the source tells, as `url` or `revision`.
        change: What a version changed, in numbers of records; None when it is none.
    """

    __tablename__ = "datasets"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    sha256: Mapped[str] = mapped_column(unique=True)
    source_name: Mapped[str]
    num_conversations: Mapped[int]
    size_bytes: Mapped[int]
    report: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    kind: Mapped[str] = mapped_column(default=Kind.CONVERSATIONS)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("datasets.id"))
    source: Mapped[dict[str, Any]] = mapped_column(default=dict)
    change: Mapped[dict[str, Any] | None]


class EditRow(Base):
    """What shall be different from a Dataset in its next version, for one record.

    Attributes:
        number: The record, from 0.
        tags: Its tags; None leaves them as they are.
        record: Its canonical line; None leaves it as it is.
    """

    __tablename__ = "edits"

    dataset_id: Mapped[int] = mapped_column(ForeignKey("datasets.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    excluded: Mapped[bool] = mapped_column(default=False)
    tags: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    record: Mapped[str | None]
    updated_at: Mapped[float]


class JobRow(Base):
    """Columns of everything that a worker executes under a Lease.

    Attributes:
        epoch: Fencing number: raised by each claim; a write that names an older one is refused.
        owner: Worker that holds the Lease.
        lease_until: End of the Lease unless it is renewed.
    """

    __abstract__ = True

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(default=RunState.QUEUED)
    epoch: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    stage: Mapped[str] = mapped_column(default="")
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


_STATES = ", ".join(f"'{state.value}'" for state in RunState)


class RunRow(JobRow):
    """One execution of a JobSpec."""

    __tablename__ = "runs"
    __table_args__ = (
        CheckConstraint(f"state IN ({_STATES})", name="runs_state"),
        Index("runs_by_state", "state"),
    )

    name: Mapped[str]
    preset: Mapped[str]
    dataset_id: Mapped[int] = mapped_column(ForeignKey("datasets.id"))
    spec: Mapped[dict[str, Any]]
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    result: Mapped[dict[str, Any] | None]
    dataset: Mapped[DatasetRow] = relationship(lazy="joined")


class PointRow(Base):
    """One measured value of a Run."""

    __tablename__ = "points"

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[float]


class ArtifactRow(JobRow):
    """A Merge of a Run's Adapter into its base."""

    __tablename__ = "artifacts"
    __table_args__ = (CheckConstraint(f"state IN ({_STATES})", name="artifacts_state"),)

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    fraction: Mapped[float] = mapped_column(default=0.0)
    certificate: Mapped[dict[str, Any] | None]
    size_bytes: Mapped[int | None]
    run: Mapped[RunRow] = relationship(lazy="joined")


class ChatRow(JobRow):
    """A chat process: one loaded base, and the tuned model of one Run or Merge."""

    __tablename__ = "chats"
    __table_args__ = (CheckConstraint(f"state IN ({_STATES})", name="chats_state"),)

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    artifact_id: Mapped[int | None] = mapped_column(ForeignKey("artifacts.id"))
    token: Mapped[str]
    port: Mapped[int | None]
    last_used_at: Mapped[float]
    run: Mapped[RunRow] = relationship(lazy="joined")
