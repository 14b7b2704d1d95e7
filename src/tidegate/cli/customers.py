"""`tidegate customers …`: in the database, or with --url over the admin API. Both do and print the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, Protocol, TypeVar

import typer

from tidegate.admin import customers
from tidegate.admin.models import CustomerCreate, CustomerPage, CustomerPatch, CustomerRead, TierName
from tidegate.admin.models.customers import AnchorDate, CustomerName, ExternalId, Timezone
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.paging import MAX_PAGE, Page
from tidegate.cli.catalog_access import ServerOptions, cli_actor, with_either
from tidegate.cli.client_tls import CaOption, CertKeyOption, CertOption, ClientTls
from tidegate.cli.common import ConfigOption, JsonOption, print_json, print_rows
from tidegate.cli.control_plane import ControlPlane, one_line
from tidegate.cli.key_limits import UntilOption, changed_overrides, parse_change, print_overrides, until_time
from tidegate.cli.keys import checked
from tidegate.cli.options import TokenFileOption, UrlOption
from tidegate.errors import PolicyError
from tidegate.policy.customers import metadata_text
from tidegate.tools.terminal import say

app = typer.Typer(
    help="Create, list, show, change and delete customers, who own API keys: in the database, or with --url over the admin API.",
    no_args_is_help=True,
)

_T = TypeVar("_T")
_COMMAND: Final = "customers"
_PATH: Final = f"/{_COMMAND}"

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The customer's name.")]
TierOption = Annotated[str | None, typer.Option("--tier", help="Tier of its keys without one of their own.")]
ExternalIdOption = Annotated[str | None, typer.Option("--external-id", help="Its id in other systems, such as cus_42.")]
AnchorOption = Annotated[
    str | None, typer.Option("--anchor", help="Date on whose day quota periods begin, such as 2026-01-31; the 1st by default.")
]
TimezoneOption = Annotated[str | None, typer.Option("--timezone", help="IANA name, such as Europe/Berlin; UTC by default.")]
MetadataOption = Annotated[str | None, typer.Option("--metadata", help='A JSON object, such as \'{"plan": "2026-b"}\'.')]
MatchOption = Annotated[
    list[str] | None,
    typer.Option("--match", help="An attribute value of its own, such as org=acme; may be repeated; replaces all others."),
]
LimitOption = Annotated[
    list[str] | None,
    typer.Option("--limit", help="Limits of its own, such as '/api/*=100/minute'; may be repeated. RULE=default removes them."),
]


class _Customers(Protocol):
    """What can be done with customers. Every method raises a TidegateError if it is refused."""

    async def create(self, request: CustomerCreate) -> CustomerRead: ...
    async def page(self, tier: str | None, limit: int, after: str | None) -> Page[CustomerRead]: ...
    async def read(self, name: str) -> CustomerRead: ...
    async def edit(self, record: CustomerRead, request: CustomerPatch) -> CustomerRead: ...
    async def delete(self, record: CustomerRead) -> None: ...


class _CustomersInCatalog:
    def __init__(self, catalog: SqlCatalog, actor: str) -> None:
        # This process caches nothing; the others are notified by the database.
        self._editor = CatalogEditor(catalog, lambda *_: None)
        self._actor = actor

    async def create(self, request: CustomerCreate) -> CustomerRead:
        return await customers.create_customer(self._editor, self._actor, request)

    async def page(self, tier: str | None, limit: int, after: str | None) -> Page[CustomerRead]:
        return await customers.list_customers(self._editor, limit, after, tier)

    async def read(self, name: str) -> CustomerRead:
        return await customers.get_customer(self._editor, name)

    async def edit(self, record: CustomerRead, request: CustomerPatch) -> CustomerRead:
        return await customers.edit_customer(self._editor, self._actor, record.name, request, {record.revision})

    async def delete(self, record: CustomerRead) -> None:
        await customers.delete_customer(self._editor, self._actor, record.name, {record.revision})


class _CustomersAtControlPlane:
    """Its methods block and await nothing."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def create(self, request: CustomerCreate) -> CustomerRead:
        return self._plane.post(_PATH, request, CustomerRead)

    async def page(self, tier: str | None, limit: int, after: str | None) -> Page[CustomerRead]:
        page = self._plane.read(_PATH, {"tier": tier, "limit": limit, "after": after}, CustomerPage)
        return Page(page.items, page.next)

    async def read(self, name: str) -> CustomerRead:
        return self._plane.read(f"{_PATH}/{name}", {}, CustomerRead)

    async def edit(self, record: CustomerRead, request: CustomerPatch) -> CustomerRead:
        return self._plane.replace(f"{_PATH}/{record.name}", request, record.revision, CustomerRead, "PATCH")

    async def delete(self, record: CustomerRead) -> None:
        self._plane.delete(f"{_PATH}/{record.name}", record.revision)


def _with_customers(
    config: Path | None,
    url: str | None,
    token_file: Path | None,
    tls: ClientTls,
    work: Callable[[_Customers], Coroutine[Any, Any, _T]],
) -> _T:
    """Run an operation in the database or over the admin API; `work` awaits nothing but its argument's methods."""
    return with_either(
        ServerOptions(config, url, token_file, tls),
        _COMMAND,
        lambda plane: work(_CustomersAtControlPlane(plane)),
        lambda catalog: work(_CustomersInCatalog(catalog, cli_actor())),
    )


@app.command("create")
def create(
    name: NameArgument,
    tier: TierOption = None,
    external_id: ExternalIdOption = None,
    anchor: AnchorOption = None,
    timezone: TimezoneOption = None,
    metadata: MetadataOption = None,
    match: MatchOption = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a customer. Its name never changes: counters use it."""
    fields = _fields(tier, external_id, anchor, timezone, metadata, match)
    request = CustomerCreate(name=checked(CustomerName, name, "NAME"), **fields)
    tls = ClientTls(ca, cert, cert_key)
    _print(_with_customers(config, url, token_file, tls, lambda there: there.create(request)), as_json)


@app.command("list")
def list_all(
    tier: Annotated[str | None, typer.Option("--tier", help="Only customers of this tier.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Maximum number of entries.")] = 100,
    after: Annotated[str | None, typer.Option("--after", help="Continue after this name.")] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List customers by name."""

    async def work(there: _Customers) -> Page[CustomerRead]:
        items: list[CustomerRead] = []
        begin = after
        while True:
            page = await there.page(tier, min(limit - len(items), MAX_PAGE), begin)
            items += page.items
            begin = page.next
            if begin is None or len(items) >= limit:
                return Page(items, begin)

    page = _with_customers(config, url, token_file, ClientTls(ca, cert, cert_key), work)
    if as_json:
        print_json([_json(record) for record in page.items])
    else:
        print_rows(
            ("name", "external_id", "tier", "anchor", "timezone", "from"),
            (
                (
                    record.name,
                    None if record.external_id is None else one_line(record.external_id),
                    record.tier,
                    record.anchor,
                    record.timezone,
                    "file" if record.managed_by_file else "api",
                )
                for record in page.items
            ),
            False,
            "no customers: make one with 'tidegate customers create NAME --tier TIER'",
        )
    if page.next is not None:
        say(f"there are more: continue with --after {one_line(page.next)}", err=True)


@app.command("show")
def show(
    name: NameArgument,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a customer. Its keys: tidegate keys list --customer NAME."""
    checked_name = checked(CustomerName, name, "NAME")
    tls = ClientTls(ca, cert, cert_key)
    _print(_with_customers(config, url, token_file, tls, lambda there: there.read(checked_name)), as_json)


@app.command("update")
def update(
    name: NameArgument,
    tier: TierOption = None,
    external_id: ExternalIdOption = None,
    anchor: AnchorOption = None,
    timezone: TimezoneOption = None,
    metadata: MetadataOption = None,
    match: MatchOption = None,
    limits: LimitOption = None,
    until: UntilOption = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change fields of a customer; what is not given stays. An empty text removes a value; consumption is kept."""
    checked_name = checked(CustomerName, name, "NAME")
    fields = _fields(tier, external_id, anchor, timezone, metadata, match)
    if until is not None and not limits:
        raise typer.BadParameter("it is for --limit: name the limits that end then", param_hint="--until")
    until_text = None if until is None else until_time(until)
    changes = [parse_change(text, until_text) for text in limits or ()]
    if not fields and not changes:
        raise typer.BadParameter("there is nothing to change: give at least one option, such as --tier")

    async def work(there: _Customers) -> CustomerRead:
        record = await there.read(checked_name)
        own: dict[str, Any] = {}
        if changes:
            after = changed_overrides(record.limits, record.overrides, changes)
            own = {"limits": after.limits, "overrides": after.overrides}
        return await there.edit(record, CustomerPatch(**fields, **own))

    _print(_with_customers(config, url, token_file, ClientTls(ca, cert, cert_key), work), as_json)


@app.command("delete")
def delete(
    name: NameArgument,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Delete a customer without active API keys; the audit log keeps its record."""
    checked_name = checked(CustomerName, name, "NAME")

    async def work(there: _Customers) -> None:
        await there.delete(await there.read(checked_name))

    _with_customers(config, url, token_file, ClientTls(ca, cert, cert_key), work)
    say(f"deleted {checked_name}")


def _fields(
    tier: str | None,
    external_id: str | None,
    anchor: str | None,
    timezone: str | None,
    metadata: str | None,
    match: list[str] | None,
) -> dict[str, Any]:
    """The fields that were given; an empty text stands for none."""
    fields: dict[str, Any] = {}
    texts: tuple[tuple[str, str | None, Any], ...] = (
        ("tier", tier, TierName),
        ("external_id", external_id, ExternalId),
        ("anchor", anchor, AnchorDate),
        ("timezone", timezone, Timezone),
    )
    for name, text, kind in texts:
        if text is not None:
            fields[name] = checked(kind, text, f"--{name.replace('_', '-')}") if text else None
    if metadata is not None:
        fields["metadata"] = _metadata(metadata)
    if match is not None:
        fields["match"] = _match(match)
    return fields


def _metadata(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
        metadata_text(value)
    except (ValueError, RecursionError):
        raise typer.BadParameter(
            'it is not JSON: write an object such as \'{"plan": "2026-b"}\'', param_hint="--metadata"
        ) from None
    except PolicyError as error:
        raise typer.BadParameter(error.reason, param_hint="--metadata") from None
    return dict(value)


def _match(texts: list[str]) -> dict[str, Any]:
    found: dict[str, list[str]] = {}
    for text in texts:
        if not text:
            continue
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise typer.BadParameter(f"{text[:60]!r} has no value: write org=acme", param_hint="--match")
        found.setdefault(name, []).append(value)
    return found


def _print(record: CustomerRead, as_json: bool) -> None:
    if as_json:
        print_json(_json(record))
        return
    for field, value in (
        ("name", record.name),
        ("external id", record.external_id),
        ("tier", record.tier),
        ("anchor", record.anchor),
        ("timezone", record.timezone),
        ("match", ", ".join(f"{name}={value}" for name, values in record.match.items() for value in values)),
        ("metadata", json.dumps(record.metadata) if record.metadata else None),
        ("created at", record.created_at),
        ("from", "file" if record.managed_by_file else "api"),
    ):
        say(f"{field:<15} {one_line(value) if value else '-'}")
    print_overrides(record.limits, record.overrides)


def _json(record: CustomerRead) -> dict[str, Any]:
    return record.model_dump(exclude={"warnings"})
