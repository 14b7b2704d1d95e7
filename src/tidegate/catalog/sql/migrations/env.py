"""Alembic's entry point: runs the migrations on the connection passed by `tidegate.catalog.sql.schema`."""

from alembic import context

from tidegate.catalog.sql.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite cannot change a column in place: Alembic copies the table.
    render_as_batch=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
