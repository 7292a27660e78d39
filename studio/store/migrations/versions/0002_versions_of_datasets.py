"""Datasets know what they hold, where they came from and what they are a version of."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Add columns and the overlay; what is there was uploaded as conversations."""
    # Not as a batch: SQLite would write the table anew and drop it under the runs that name it.
    op.execute("ALTER TABLE datasets ADD COLUMN kind VARCHAR NOT NULL DEFAULT 'conversations'")
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    number = "INTEGER" if is_sqlite else "BIGINT"
    op.execute(f"ALTER TABLE datasets ADD COLUMN parent_id {number} REFERENCES datasets (id)")
    op.execute("ALTER TABLE datasets ADD COLUMN source JSON NOT NULL DEFAULT '{}'")
    op.execute("ALTER TABLE datasets ADD COLUMN change JSON")
    make = "json_object" if is_sqlite else "json_build_object"
    op.execute(f"UPDATE datasets SET source = {make}('type', 'upload', 'name', source_name)")
    op.create_table(
        "edits",
        sa.Column("dataset_id", WHOLE, sa.ForeignKey("datasets.id"), primary_key=True),
        sa.Column("number", WHOLE, primary_key=True),
        sa.Column("excluded", sa.Boolean(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=True),
        sa.Column("record", sa.String(), nullable=True),
        sa.Column("updated_at", sa.Double(), nullable=False),
    )


def downgrade() -> None:
    """Drop the overlay and the columns; the Datasets and their files stay."""
    op.drop_table("edits")
    for column in ("change", "source", "parent_id", "kind"):
        op.execute(f"ALTER TABLE datasets DROP COLUMN {column}")
