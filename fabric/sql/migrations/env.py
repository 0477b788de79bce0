"""Run by Alembic: migrate on the connection (and in the transaction) the caller gave."""

from alembic import context

from fabric.sql.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
