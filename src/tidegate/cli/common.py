"""Options, settings and output shared by the commands."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.table import Table
from rich.text import Text

from tidegate.policy.key_hash import key_hash_of, use_key_hash
from tidegate.settings import Settings
from tidegate.settings_loader import load_settings
from tidegate.tools.charts import clean
from tidegate.tools.terminal import json_text, open_console

if TYPE_CHECKING:
    from tidegate.catalog.sql.catalog import SqlCatalog

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Settings file (TOML); default: tidegate.toml, if it exists. TIDEGATE_SECTION__KEY overrides."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

_T = TypeVar("_T")


def read_settings(config: Path | None, *, has_token: bool = False) -> Settings:
    """Load the settings from the file given with `--config`, if any, and the environment; API keys are hashed as they say.

    Args:
        has_token: whether a token was given otherwise, so that the one in the environment is not looked at.

    Raises:
        SettingsError: if they are invalid.
    """
    ignored = "TIDEGATE_ADMIN__TOKEN" if has_token else None
    settings = load_settings(config, {name: value for name, value in os.environ.items() if name != ignored})
    use_key_hash(key_hash_of(settings.keys.hash, settings.keys.pepper))
    return settings


def with_catalog(config: Path | None, work: Callable[[SqlCatalog], Awaitable[_T]]) -> _T:
    """Open the catalog, run `work` on it, close it, and return the result of `work`.

    Raises:
        TidegateError: from opening the catalog, or from `work`.
    """

    from tidegate.server.wiring import opened_catalog

    async def run() -> _T:
        async with opened_catalog(read_settings(config)) as catalog:
            return await work(catalog)

    return asyncio.run(run())


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[object]], as_json: bool, empty: str) -> None:
    """Print rows as a table, or as a JSON list of objects.

    Args:
        columns: names of the columns.
        rows: values in the order of `columns`.
        as_json: JSON instead of a table.
        empty: message on stderr if there are no rows.
    """
    listed = [list(row) for row in rows]
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in listed])
        return
    if not listed:
        typer.echo(empty, err=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in listed:
        table.add_row(*(Text(clean(_cell_text(value))) for value in row))
    open_console().print(table)


def print_json(value: Any) -> None:
    """Print JSON types as indented JSON on stdout."""
    typer.echo(json_text(json.dumps(value, indent=2, ensure_ascii=False), sys.stdout.encoding))


def _cell_text(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
