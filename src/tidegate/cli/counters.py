"""`tidegate counters …`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli import subjects
from tidegate.cli.catalog_access import cli_actor
from tidegate.cli.common import ConfigOption, JsonOption, print_json, read_settings, with_catalog
from tidegate.errors import SettingsError
from tidegate.timestamps import now_us
from tidegate.tools.charts import clean
from tidegate.tools.terminal import say
from tidegate.url_parts import scheme_of

if TYPE_CHECKING:
    from tidegate.admin.restore import Restored
    from tidegate.catalog.sql.catalog import SqlCatalog

app = typer.Typer(help="Reset counters, or restore them from the usage ledger.", no_args_is_help=True)
app.command("reset")(subjects.reset)


@app.command("restore")
def restore(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; print what would be done.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Raise the counters of long windows to the units of the usage ledger, after Redis was lost. Never lowers one."""
    settings = read_settings(config)
    if not scheme_of(settings.counters.url).startswith("redis"):
        raise SettingsError(
            "counters.url is memory://: such counters end with their process; only those in Redis can be restored"
        )
    restored = with_catalog(config, lambda catalog: _restore(catalog, settings.counters.url, dry_run=dry_run))
    if as_json:
        print_json({"counters": restored.counters, "units": restored.units, "not_restored": list(restored.not_restored)})
        return
    verb = "would be" if dry_run else "were"
    say(f"{restored.counters:,} counters {verb} raised, by {restored.units:,} units together")
    for rule in restored.not_restored:
        say(f"not restored, starts from what the store has: {clean(rule)}", err=True)


async def _restore(catalog: SqlCatalog, url: str, *, dry_run: bool) -> Restored:
    from tidegate.admin.restore import restore_counters
    from tidegate.admin.rules import CatalogEditor
    from tidegate.counters.redis.store import RedisCounters

    # A long time limit: nobody waits for a single check.
    store = RedisCounters(url, 5.0)
    try:
        await store.ping()
        restored = await restore_counters(catalog, store, now_us(), dry_run=dry_run)
    finally:
        await store.close()
    if restored.counters and not dry_run:
        after = {"counters": restored.counters, "units": restored.units}
        await CatalogEditor(catalog, lambda *_: None).record(cli_actor(), "restore", "counters", "usage ledger", after)
    return restored
