"""What Alembic runs: the migrations on the connection that `tidegate.catalog.sql.schema` hands over."""

from alembic import context

from tidegate.catalog.sql.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite cannot change a column in place: Alembic then copies the table.
    render_as_batch=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
