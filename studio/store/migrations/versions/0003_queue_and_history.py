"""Runs have an order, needs and parents; what happened is kept; workers are listed."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JOBS = ("runs", "artifacts", "chats")


def _of_all_jobs() -> list[sa.Column[Any]]:
    return [
        sa.Column("host", sa.String(), nullable=True),
        sa.Column("boot_id", sa.String(), nullable=True),
        sa.Column("wish", sa.String(), nullable=False, server_default=""),
        sa.Column("crashes", WHOLE, nullable=False, server_default="0"),
        sa.Column("losses", WHOLE, nullable=False, server_default="0"),
        sa.Column("furthest", WHOLE, nullable=False, server_default="0"),
    ]


def _of_runs() -> list[sa.Column[Any]]:
    return [
        sa.Column("priority", WHOLE, nullable=False, server_default="0"),
        sa.Column("place", sa.Double(), nullable=True),
        sa.Column("is_held", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("start_after", sa.Double(), nullable=True),
        sa.Column("num_gpus", WHOLE, nullable=False, server_default="0"),
        sa.Column("needs_gib", sa.Double(), nullable=True),
        sa.Column("gpus", sa.JSON(), nullable=True),
        sa.Column("saves_asked", WHOLE, nullable=False, server_default="0"),
        sa.Column("evaluations_asked", WHOLE, nullable=False, server_default="0"),
        sa.Column("parent_step", WHOLE, nullable=True),
        sa.Column("parent_keep", sa.String(), nullable=False, server_default=""),
    ]


def upgrade() -> None:
    """Add columns and tables; what waits keeps its order of arrival."""
    # Not as a batch: SQLite would write the table anew and drop it under the rows that name it.
    for table in _JOBS:
        for column in _of_all_jobs():
            op.add_column(table, column)
    for column in _of_runs():
        op.add_column("runs", column)
    whole = "INTEGER" if op.get_bind().dialect.name == "sqlite" else "BIGINT"
    for name in ("after_run_id", "parent_id"):
        op.execute(f"ALTER TABLE runs ADD COLUMN {name} {whole} REFERENCES runs (id)")
    runs = sa.table(
        "runs",
        sa.column("id", sa.Integer),
        sa.column("place", sa.Double),
        sa.column("num_gpus", sa.Integer),
        sa.column("spec", sa.JSON),
    )
    there = op.get_bind().execute(sa.select(runs.c.id, runs.c.spec)).all()
    for number, spec in there:
        cards = int(spec.get("train", {}).get("num_gpus", 0))
        values = {"place": float(number), "num_gpus": cards}
        op.execute(sa.update(runs).where(runs.c.id == number).values(values))
    op.create_table(
        "events",
        sa.Column("job", sa.String(), primary_key=True),
        sa.Column("job_id", WHOLE, primary_key=True),
        sa.Column("seq", WHOLE, primary_key=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("epoch", WHOLE, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("boot_id", sa.String(), nullable=False),
        sa.Column("pid", WHOLE, nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_until", sa.Double(), nullable=False),
        sa.Column("cards", sa.JSON(), nullable=False),
        sa.Column("is_closing", sa.Boolean(), nullable=False),
    )
    op.create_table(
        "queue",
        sa.Column("id", WHOLE, primary_key=True),
        sa.Column("is_paused", sa.Boolean(), nullable=False),
    )


def downgrade() -> None:
    """Drop the tables and the columns: history and order are lost, Runs stay."""
    for table in ("queue", "workers", "events"):
        op.drop_table(table)
    for name in ("parent_id", "after_run_id"):
        op.execute(f"ALTER TABLE runs DROP COLUMN {name}")
    for column in reversed(_of_runs()):
        op.execute(f"ALTER TABLE runs DROP COLUMN {column.name}")
    for table in _JOBS:
        for column in reversed(_of_all_jobs()):
            op.execute(f"ALTER TABLE {table} DROP COLUMN {column.name}")
