"""Alembic's entry: runs migrations on the connection that the Database hands over."""

from alembic import context

from studio.store.rows import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite alters a table by writing it anew
)
context.run_migrations()
