"""`tidegate db …`."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from tidegate.catalog.sql import schema
from tidegate.cli.common import ConfigOption, read_settings

app = typer.Typer(help="Look after the catalog's database.", no_args_is_help=True)


@app.command("upgrade")
def upgrade(config: ConfigOption = None) -> None:
    """Upgrade the database's schema to this version."""
    revision = asyncio.run(schema.upgrade(read_settings(config).catalog.url))
    typer.echo(f"the database is at revision {revision}")


@app.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(help="Revision to go back to, such as 0002.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    config: ConfigOption = None,
) -> None:
    """Downgrade the database's schema; tables and columns of later revisions are dropped with their data."""
    if not yes:
        typer.confirm(f"Drop the tables and columns added after revision {revision}, with their data?", abort=True)
    typer.echo(f"the database is at revision {asyncio.run(schema.downgrade(read_settings(config).catalog.url, revision))}")
