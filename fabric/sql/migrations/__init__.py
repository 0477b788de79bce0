"""The history of the schema, run by ``fabric.sql.migrate``. A revision is named as its file."""
