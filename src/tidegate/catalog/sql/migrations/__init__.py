"""Alembic's migrations of the catalog. `tidegate db upgrade` and the start of a server run them."""
