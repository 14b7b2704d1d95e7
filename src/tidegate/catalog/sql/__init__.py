"""The catalog in a database, SQLite or PostgreSQL: one body through SQLAlchemy Core.

`catalog` is the port's implementation, `database` has the primary and its read replicas, `tables` the schema, `schema` brings a
database to it, `change_log` records what each change touched. A database that does not answer raises `CatalogUnavailable`.
"""
