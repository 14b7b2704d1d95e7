"""`tidegate blocks …`: in the database, or with --url over the admin API. Both do and print the same."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from tidegate.admin.block_models import BlockCreate, BlockPage, BlockRead
from tidegate.admin.blocks import create_block, list_blocks, remove_block
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.blocks import attributes_text
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.paging import MAX_PAGE, Page
from tidegate.cli.catalog_access import ServerOptions, cli_actor, with_either
from tidegate.cli.client_tls import CaOption, CertKeyOption, CertOption, ClientTls
from tidegate.cli.common import ConfigOption, JsonOption, print_json, print_rows
from tidegate.cli.control_plane import ControlPlane, one_line
from tidegate.cli.keys import lifetime_s, to_seconds
from tidegate.cli.options import TokenFileOption, UrlOption
from tidegate.errors import BadRequest
from tidegate.policy.attributes import parse_subject
from tidegate.timestamps import US_PER_S, format_timestamp, now_us
from tidegate.tools.terminal import say

app = typer.Typer(
    help="Block networks, API keys, customers or values of attributes, whatever their limits: in the database, or with --url "
    "over the admin API. Running servers apply a change within a second.",
    no_args_is_help=True,
)

_T = TypeVar("_T")
_COMMAND = "blocks"
_PATH = f"/{_COMMAND}"

IdArgument = Annotated[int, typer.Argument(metavar="ID", min=1, max=2**53, help="The block's id, as 'list' prints it.")]


class _Blocks(Protocol):
    """What can be done with blocks. Every method raises a TidegateError if it is refused."""

    async def create(self, request: BlockCreate) -> BlockRead: ...
    async def page(self, limit: int, after: str | None, status: str, ip: str | None) -> Page[BlockRead]: ...
    async def remove(self, block_id: int) -> BlockRead: ...


class _BlocksInCatalog:
    def __init__(self, catalog: SqlCatalog, actor: str) -> None:
        # This process caches nothing; the others are notified by the database.
        self._editor = CatalogEditor(catalog, lambda *_: None)
        self._actor = actor

    async def create(self, request: BlockCreate) -> BlockRead:
        return await create_block(self._editor, self._actor, request)

    async def page(self, limit: int, after: str | None, status: str, ip: str | None) -> Page[BlockRead]:
        return await list_blocks(self._editor, limit, after, status, ip=ip)

    async def remove(self, block_id: int) -> BlockRead:
        return await remove_block(self._editor, self._actor, block_id)


class _BlocksAtControlPlane:
    """Its methods block, and wait for nothing else."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def create(self, request: BlockCreate) -> BlockRead:
        return self._plane.post(_PATH, request, BlockRead)

    async def page(self, limit: int, after: str | None, status: str, ip: str | None) -> Page[BlockRead]:
        page = self._plane.read(_PATH, {"limit": limit, "after": after, "status": status, "ip": ip}, BlockPage)
        return Page(page.items, page.next)

    async def remove(self, block_id: int) -> BlockRead:
        return self._plane.revoke(f"{_PATH}/{block_id}", BlockRead)


@app.command("add")
def add(
    network: Annotated[
        str | None,
        typer.Argument(metavar="[CIDR]", help="Network or address, such as 203.0.113.0/24. An IPv6 address stands for its /64."),
    ] = None,
    api_key_id: Annotated[str | None, typer.Option("--api-key-id", help="Id of an API key, as 'keys list' prints it.")] = None,
    customer: Annotated[str | None, typer.Option("--customer", help="Name of a customer.")] = None,
    attribute: Annotated[
        str | None, typer.Option("--attribute", help="Exact values, such as user=42, or org=acme&user=42 for both together.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="When it ends, such as 2027-01-31T00:00:00Z.")] = None,
    lifetime: Annotated[str | None, typer.Option("--for", help="How long it holds, such as 1h or 7d.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; for operators only.")] = "",
    message: Annotated[str, typer.Option("--message", help="What the blocked client is shown.")] = "",
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Block someone. Running servers deny the next request within a second."""
    if until is not None and lifetime is not None:
        raise typer.BadParameter("--until and --for both say when it ends: give one of them", param_hint="--for")
    if lifetime is not None:
        until = format_timestamp(now_us() + lifetime_s(lifetime, "--for") * US_PER_S)
    fields: dict[str, Any] = {
        "cidr": network,
        "api_key_id": api_key_id,
        "customer": customer,
        "attribute": None if attribute is None else _attributes(attribute),
        "until": until,
        "reason": reason,
        "message": message,
    }
    request = _request({name: value for name, value in fields.items() if value not in (None, "")})
    made = _with_blocks(config, url, token_file, ClientTls(ca, cert, cert_key), lambda blocks: blocks.create(request))
    if as_json:
        print_json(made.model_dump())
        return
    end = "until it is removed" if made.until is None else f"until {to_seconds(made.until)}"
    say(f"blocked {_target(made)} {end}; lift it with: tidegate blocks remove {made.id}")


@app.command("list")
def list_all(
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Maximum number of blocks.")] = 100,
    after: Annotated[int | None, typer.Option("--after", min=1, max=2**53, help="Continue after this id.")] = None,
    ended: Annotated[bool, typer.Option("--ended", help="List those that expired or were removed.")] = False,
    ip: Annotated[str | None, typer.Option("--ip", help="Only networks that contain this address.")] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the blocks that hold, the newest first."""
    status = "ended" if ended else "active"

    async def collect(blocks: _Blocks) -> Page[BlockRead]:
        items: list[BlockRead] = []
        place = None if after is None else str(after)
        while True:
            page = await blocks.page(min(limit - len(items), MAX_PAGE), place, status, ip)
            items += page.items
            place = page.next
            if place is None or not page.items or len(items) >= limit:
                return Page(items, place)

    page = _with_blocks(config, url, token_file, ClientTls(ca, cert, cert_key), collect)
    if as_json:
        print_json([record.model_dump() for record in page.items])
    else:
        print_rows(
            ("id", "blocked", "status", "until", "reason", "created_by", "created_at"),
            (
                (
                    record.id,
                    _target(record),
                    one_line(record.status),
                    to_seconds(record.until),
                    one_line(record.reason),
                    one_line(record.created_by),
                    to_seconds(record.created_at),
                )
                for record in page.items
            ),
            False,
            "no blocks" if after is None else "no more blocks",
        )
    if page.next is not None:
        say(f"there are more: continue with --after {one_line(page.next)}", err=True)


@app.command("remove")
def remove(
    block_id: IdArgument,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lift a block. Running servers answer its client as before within a second."""
    record = _with_blocks(config, url, token_file, ClientTls(ca, cert, cert_key), lambda blocks: blocks.remove(block_id))
    if as_json:
        print_json(record.model_dump())
    else:
        say(f"removed block {record.id}, {_target(record)}")


def _request(fields: dict[str, Any]) -> BlockCreate:
    from pydantic import ValidationError

    try:
        return BlockCreate(**fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = str(problem["loc"][0])
        option = {"cidr": "CIDR", "api_key_id": "--api-key-id"}.get(field, f"--{field}")
        raise typer.BadParameter(str(problem["msg"]).removeprefix("Value error, "), param_hint=option) from None


def _attributes(text: str) -> dict[str, str]:
    try:
        return parse_subject(text)
    except BadRequest:
        raise typer.BadParameter(
            f"{text[:60]!r} is not valid; expected e.g. user=42, or org=acme&user=42 for both together", param_hint="--attribute"
        ) from None


def _target(record: BlockRead) -> str:
    if record.cidr is not None:
        return one_line(record.cidr)
    if record.api_key_id is not None:
        return f"API key {one_line(record.api_key_id)}"
    if record.customer is not None:
        return f"customer {one_line(record.customer)}"
    return one_line(attributes_text(record.attribute or {}))


def _with_blocks(
    config: Path | None,
    url: str | None,
    token_file: Path | None,
    tls: ClientTls,
    work: Callable[[_Blocks], Coroutine[Any, Any, _T]],
) -> _T:
    """Run an operation in the database or over the admin API; `work` awaits nothing but its argument's methods."""
    return with_either(
        ServerOptions(config, url, token_file, tls),
        _COMMAND,
        lambda plane: work(_BlocksAtControlPlane(plane)),
        lambda catalog: work(_BlocksInCatalog(catalog, cli_actor())),
    )
