"""`tidegate keys …` and `tidegate db …`."""

from __future__ import annotations

import asyncio
import datetime
import re
from typing import Annotated

import typer

from tidegate.catalog import schema
from tidegate.cli.common import ConfigOption, JsonOption, print_json, print_rows, read_settings, with_catalog
from tidegate.limits import US_PER_S

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
database = typer.Typer(help="Look after the catalog's database.", no_args_is_help=True)

_LIFETIME = re.compile(r"([0-9]{1,6})([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.command("create")
def create(
    tier: Annotated[str, typer.Option("--tier", help="The key's tier.")],
    name: Annotated[str, typer.Option("--name", help="A label for people.")] = "",
    expires_in: Annotated[
        str | None, typer.Option("--expires-in", help="Lifetime, such as 90d or 12h; for ever where not given.")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and show it, this once: only its digest is stored."""
    expires_at_us = None if expires_in is None else _now_us() + _lifetime_us(expires_in)
    api_key, record = with_catalog(config, lambda catalog: catalog.create_key(tier, name=name, expires_at_us=expires_at_us))
    if as_json:
        print_json(
            {
                "id": record.id,
                "api_key": api_key,
                "tier": record.tier,
                "name": record.name,
                "expires_at": _iso(record.expires_at_us),
            }
        )
        return
    typer.echo(api_key)
    typer.echo(f"id {record.id}, tier {record.tier}. It is shown this once: keep it now.", err=True)


@app.command("list")
def list_keys(
    tier: Annotated[str | None, typer.Option("--tier", help="Only the keys of this tier.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="At most so many.")] = 100,
    after: Annotated[str | None, typer.Option("--after", help="Go on after this id.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List keys by id; the keys themselves are not known to anyone."""
    rows = with_catalog(config, lambda catalog: catalog.list_keys(tier=tier, limit=limit, after=after))
    print_rows(
        ("id", "tier", "name", "status", "created_at", "expires_at", "revoked_reason", "from"),
        (
            (
                row.api_key.id,
                row.api_key.tier,
                row.api_key.name,
                row.api_key.status.value,
                _iso(row.created_at_us),
                _iso(row.api_key.expires_at_us),
                row.revoked_reason,
                "file" if row.api_key.managed_by_file else "api",
            )
            for row in rows
        ),
        as_json,
        "no keys: make one with 'tidegate keys create --tier NAME'",
    )


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id, the beginning of it (6 characters or more), or the key itself.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, for those who look later.")],
    config: ConfigOption = None,
) -> None:
    """Revoke a key. Running servers refuse it within a second."""
    record = with_catalog(config, lambda catalog: catalog.revoke_key(key, reason))
    typer.echo(f"revoked {record.id} of tier {record.tier}")


@database.command("upgrade")
def upgrade_database(config: ConfigOption = None) -> None:
    """Bring the database's schema up to this version."""
    revision = asyncio.run(schema.upgrade(read_settings(config).catalog.url))
    typer.echo(f"the database is at revision {revision}")


@database.command("downgrade")
def downgrade_database(
    revision: Annotated[str, typer.Argument(help="Where to go back to, such as 0002.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config: ConfigOption = None,
) -> None:
    """Take the database's schema back; what the later steps had added is dropped with all that it holds."""
    if not yes:
        typer.confirm(f"Drop what the steps after {revision} added, and all that it holds?", abort=True)
    typer.echo(f"the database is at revision {asyncio.run(schema.downgrade(read_settings(config).catalog.url, revision))}")


def _lifetime_us(text: str) -> int:
    match = _LIFETIME.fullmatch(text)
    if match is None or int(match.group(1)) == 0:
        raise typer.BadParameter(f"{text!r} is no lifetime: write 90d, 12h, 30m or 45s", param_hint="--expires-in")
    return int(match.group(1)) * _SECONDS[match.group(2)] * US_PER_S


def _now_us() -> int:
    return int(datetime.datetime.now(datetime.UTC).timestamp() * US_PER_S)


def _iso(us: int | None) -> str | None:
    return None if us is None else datetime.datetime.fromtimestamp(us / US_PER_S, datetime.UTC).isoformat(timespec="seconds")
