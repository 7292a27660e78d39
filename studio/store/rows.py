"""Tables. Times are seconds since 1970 in UTC; JSON columns hold values that domain models check."""

from typing import Any, ClassVar

from sqlalchemy import JSON, CheckConstraint, Double, ForeignKey, Index
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from studio.domain.conversation import Kind
from studio.domain.run import RunState, Wish
from studio.store.dialects import WHOLE_NUMBER


class Base(DeclarativeBase):
    """Base of all rows."""

    type_annotation_map: ClassVar = {
        dict[str, Any]: JSON,
        list[str]: JSON,
        float: Double,
        int: WHOLE_NUMBER,
    }


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
        host: Name of its machine.
        boot_id: Of its running system: see studio.store.clock.
        lease_until: End of the Lease unless it is renewed, on the clock of studio.store.clock.
        wish: What shall become of it once it has stopped.
        crashes: Tries that crashed, since it got any further.
        losses: Tries whose worker was lost, since it got any further.
        furthest: The most steps that a try had done when it ended so.
    """

    __abstract__ = True

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(default=RunState.QUEUED)
    epoch: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None]
    host: Mapped[str | None]
    boot_id: Mapped[str | None]
    lease_until: Mapped[float | None]
    wish: Mapped[str] = mapped_column(default=Wish.NONE)
    crashes: Mapped[int] = mapped_column(default=0)
    losses: Mapped[int] = mapped_column(default=0)
    furthest: Mapped[int] = mapped_column(default=0)
    stage: Mapped[str] = mapped_column(default="")
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


_STATES = ", ".join(f"'{state.value}'" for state in RunState)


class RunRow(JobRow):
    """One execution of a JobSpec.

    Attributes:
        priority: Of the queue: the higher one starts first.
        place: Order among those of the same priority; by default the order of arrival.
        is_held: Whether it waits in the queue until somebody lets it go on.
        start_after: Moment before which it does not start.
        after_run_id: Run that must have finished before it starts.
        num_gpus: Cards that it needs; 0 is the CPU.
        needs_gib: Memory that it needs on each card; None where it is not known.
        gpus: Numbers of the cards that it has now.
        saves_asked: How often somebody wished a Checkpoint now, in this try.
        evaluations_asked: How often somebody wished an evaluation now, in this try.
        parent_id: The Run that it was forked from.
        parent_step: The step of the Checkpoint that it began from.
        parent_keep: What it took from there: "everything" or "weights".
    """

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
    priority: Mapped[int] = mapped_column(default=0)
    place: Mapped[float | None]
    is_held: Mapped[bool] = mapped_column(default=False)
    start_after: Mapped[float | None]
    after_run_id: Mapped[int | None] = mapped_column(ForeignKey("runs.id"))
    num_gpus: Mapped[int] = mapped_column(default=0)
    needs_gib: Mapped[float | None]
    gpus: Mapped[list[int] | None] = mapped_column(JSON(none_as_null=True))
    saves_asked: Mapped[int] = mapped_column(default=0)
    evaluations_asked: Mapped[int] = mapped_column(default=0)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("runs.id"))
    parent_step: Mapped[int | None]
    parent_keep: Mapped[str] = mapped_column(default="")
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


class EventRow(Base):
    """One thing that happened to a Run, a Merge or a Chat.

    Attributes:
        job: Name of its table.
        seq: From 1.
        epoch: Of the Lease under which it happened; 0 where there was none.
        kind: One or two words.
        text: A sentence for a person.
    """

    __tablename__ = "events"

    job: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    epoch: Mapped[int]
    kind: Mapped[str]
    text: Mapped[str]


class WorkerRow(Base):
    """A worker process, as it describes itself while it lives.

    Attributes:
        seen_until: Moment on the clock of Leases until which it is believed to live.
        cards: Its GPUs, as studio.domain.placement.Card describes them.
        is_closing: Whether it takes no more work.
    """

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    boot_id: Mapped[str]
    pid: Mapped[int]
    version: Mapped[str]
    started_at: Mapped[float]
    seen_until: Mapped[float]
    cards: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    is_closing: Mapped[bool] = mapped_column(default=False)


class QueueRow(Base):
    """The queue of Runs as a whole: one row, its number is 1."""

    __tablename__ = "queue"

    id: Mapped[int] = mapped_column(primary_key=True)
    is_paused: Mapped[bool] = mapped_column(default=False)
