"""First schema: datasets, runs, points, artifacts, chats."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# PostgreSQL's INTEGER ends at 2 GiB; SQLite numbers rows by itself only where the type is INTEGER.
WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
STATES = "state IN ('QUEUED', 'RUNNING', 'STOPPING', 'STOPPED', 'FINISHED', 'FAILED')"


def _leased() -> list[sa.Column[Any]]:
    return [
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("epoch", WHOLE, nullable=False),
        sa.Column("owner", sa.String(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("stage", sa.String(), nullable=False),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
    ]


def upgrade() -> None:
    """Create all tables."""
    op.create_table(
        "datasets",
        sa.Column("id", WHOLE, primary_key=True),
        sa.Column("name", sa.String(), nullable=False, unique=True),
        sa.Column("sha256", sa.String(), nullable=False, unique=True),
        sa.Column("source_name", sa.String(), nullable=False),
        sa.Column("num_conversations", WHOLE, nullable=False),
        sa.Column("size_bytes", WHOLE, nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_table(
        "runs",
        sa.Column("id", WHOLE, primary_key=True),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("preset", sa.String(), nullable=False),
        sa.Column("dataset_id", WHOLE, sa.ForeignKey("datasets.id"), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("step", WHOLE, nullable=False),
        sa.Column("total_steps", WHOLE, nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        *_leased(),
        sa.CheckConstraint(STATES, name="runs_state"),
    )
    op.create_index("runs_by_state", "runs", ["state"])
    op.create_table(
        "points",
        sa.Column("run_id", WHOLE, sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("step", WHOLE, primary_key=True),
        sa.Column("value", sa.Double(), nullable=False),
    )
    op.create_table(
        "artifacts",
        sa.Column("id", WHOLE, primary_key=True),
        sa.Column("run_id", WHOLE, sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("fraction", sa.Double(), nullable=False),
        sa.Column("certificate", sa.JSON(), nullable=True),
        sa.Column("size_bytes", WHOLE, nullable=True),
        *_leased(),
        sa.CheckConstraint(STATES, name="artifacts_state"),
    )
    op.create_table(
        "chats",
        sa.Column("id", WHOLE, primary_key=True),
        sa.Column("run_id", WHOLE, sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("artifact_id", WHOLE, sa.ForeignKey("artifacts.id"), nullable=True),
        sa.Column("token", sa.String(), nullable=False),
        sa.Column("port", WHOLE, nullable=True),
        sa.Column("last_used_at", sa.Double(), nullable=False),
        *_leased(),
        sa.CheckConstraint(STATES, name="chats_state"),
    )


def downgrade() -> None:
    """Drop all tables."""
    for table in ("chats", "artifacts", "points", "runs", "datasets"):
        op.drop_table(table)
