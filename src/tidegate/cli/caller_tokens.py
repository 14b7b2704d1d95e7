"""`tidegate caller-tokens …`: in the database, or with --url over the admin API. Both do and print the same."""

from __future__ import annotations

import enum
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from tidegate.admin import caller_tokens
from tidegate.admin.caller_token_models import (
    CallerTokenCreate,
    CallerTokenMade,
    CallerTokenPage,
    CallerTokenRead,
    CallerTokenRotated,
)
from tidegate.admin.models import Name, RotateRequest
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.paging import MAX_PAGE, Page
from tidegate.cli.catalog_access import ServerOptions, cli_actor, with_either
from tidegate.cli.client_tls import CaOption, CertKeyOption, CertOption, ClientTls
from tidegate.cli.common import ConfigOption, JsonOption, print_json, print_rows
from tidegate.cli.control_plane import ControlPlane, one_line
from tidegate.cli.keys import MAX_GRACE_S, checked, lifetime_s, to_seconds
from tidegate.cli.options import TokenFileOption, UrlOption
from tidegate.timestamps import US_PER_S, format_timestamp, now_us, parse_timestamp
from tidegate.tools.terminal import say

app = typer.Typer(
    help="Create, list, rotate and revoke the tokens of gateways and back ends that call the data plane ([callers_auth]): in the "
    "database, or with --url over the admin API.",
    no_args_is_help=True,
)

_T = TypeVar("_T")
_COMMAND = "caller-tokens"
_PATH = f"/{_COMMAND}"

IdArgument = Annotated[int, typer.Argument(metavar="ID", min=1, max=2**53, help="The token's id, as 'list' prints it.")]


class Scope(enum.StrEnum):
    """What a token permits."""

    CHECK = "check"
    LIMIT = "limit"
    HOLD = "hold"
    LEASE = "lease"


class _Tokens(Protocol):
    """What can be done with tokens. Every method raises a TidegateError if it is refused."""

    async def create(self, request: CallerTokenCreate) -> CallerTokenMade: ...
    async def page(self, limit: int, after: str | None) -> Page[CallerTokenRead]: ...
    async def rotate(self, token_id: int, grace_s: int) -> CallerTokenRotated: ...
    async def revoke(self, token_id: int) -> CallerTokenRead: ...


class _TokensInCatalog:
    def __init__(self, catalog: SqlCatalog, actor: str) -> None:
        # This process caches nothing; the others are notified by the database.
        self._editor = CatalogEditor(catalog, lambda *_: None)
        self._actor = actor

    async def create(self, request: CallerTokenCreate) -> CallerTokenMade:
        expires_at_us = None if request.expires_at is None else parse_timestamp(request.expires_at, "expires_at")
        return await caller_tokens.create_caller_token(self._editor, self._actor, request.name, request.scopes, expires_at_us)

    async def page(self, limit: int, after: str | None) -> Page[CallerTokenRead]:
        return await caller_tokens.list_caller_tokens(self._editor, limit, after)

    async def rotate(self, token_id: int, grace_s: int) -> CallerTokenRotated:
        return await caller_tokens.rotate_caller_token(self._editor, self._actor, token_id, grace_s)

    async def revoke(self, token_id: int) -> CallerTokenRead:
        return await caller_tokens.revoke_caller_token(self._editor, self._actor, token_id)


class _TokensAtControlPlane:
    """Its methods block, and wait for nothing else."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def create(self, request: CallerTokenCreate) -> CallerTokenMade:
        return self._plane.post(_PATH, request, CallerTokenMade)

    async def page(self, limit: int, after: str | None) -> Page[CallerTokenRead]:
        page = self._plane.read(_PATH, {"limit": limit, "after": after}, CallerTokenPage)
        return Page(page.items, page.next)

    async def rotate(self, token_id: int, grace_s: int) -> CallerTokenRotated:
        return self._plane.post(f"{_PATH}/{token_id}/rotate", RotateRequest(grace_s=grace_s), CallerTokenRotated)

    async def revoke(self, token_id: int) -> CallerTokenRead:
        return self._plane.revoke(f"{_PATH}/{token_id}", CallerTokenRead)


@app.command("create")
def create(
    name: Annotated[str, typer.Option("--name", help="The gateway or back end that will use it.")],
    scope: Annotated[list[Scope], typer.Option("--scope", help="What it permits; may be given several times.")] = [Scope.CHECK],  # noqa: B006 - typer copies it
    expires_in: Annotated[
        str | None, typer.Option("--expires-in", help="Lifetime, such as 90d or 12h; by default it does not expire.")
    ] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a token and print it, only this once: only its digest is stored."""
    if not name.strip():
        raise typer.BadParameter("it is blank: name the gateway or back end", param_hint="--name")
    lifetime_us = None if expires_in is None else lifetime_s(expires_in, "--expires-in") * US_PER_S
    request = CallerTokenCreate(
        name=checked(Name, name, "--name"),
        scopes=[each.value for each in Scope if each in scope],
        expires_at=None if lifetime_us is None else format_timestamp(now_us() + lifetime_us),
    )
    made = _with_tokens(config, url, token_file, ClientTls(ca, cert, cert_key), lambda tokens: tokens.create(request))
    if as_json:
        print_json(made.model_dump())
        return
    say(one_line(made.token))
    say(f"id {made.id}, scopes {', '.join(made.scopes)}. It is not shown again: store it now.", err=True)


@app.command("list")
def list_tokens(
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Maximum number of tokens.")] = 100,
    after: Annotated[int | None, typer.Option("--after", min=1, max=2**53, help="Continue after this id.")] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List tokens by id, revoked ones too; the tokens themselves are not stored."""

    async def collect(tokens: _Tokens) -> Page[CallerTokenRead]:
        items: list[CallerTokenRead] = []
        place = None if after is None else str(after)
        while True:
            page = await tokens.page(min(limit - len(items), MAX_PAGE), place)
            items += page.items
            place = page.next
            if place is None or not page.items or len(items) >= limit:
                return Page(items, place)

    page = _with_tokens(config, url, token_file, ClientTls(ca, cert, cert_key), collect)
    if as_json:
        print_json([record.model_dump() for record in page.items])
    else:
        print_rows(
            ("id", "name", "scopes", "status", "created_at", "expires_at", "revoked_at"),
            (
                (
                    record.id,
                    one_line(record.name),
                    record.scopes,
                    one_line(record.status),
                    to_seconds(record.created_at),
                    to_seconds(record.expires_at),
                    to_seconds(record.revoked_at),
                )
                for record in page.items
            ),
            False,
            "no tokens: create one with 'tidegate caller-tokens create --name NAME'" if after is None else "no more tokens",
        )
    if page.next is not None:
        say(f"there are more: continue with --after {one_line(page.next)}", err=True)


@app.command("rotate")
def rotate(
    token_id: IdArgument,
    grace: Annotated[
        str | None,
        typer.Option("--grace", help="How long the old token still works, such as 1h or 7d; by default it is revoked now."),
    ] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replace a token by a new one with the same name, scopes and expiry, and print that, only this once."""
    grace_s = 0 if grace is None else lifetime_s(grace, "--grace")
    if grace_s > MAX_GRACE_S:
        raise typer.BadParameter(f"{grace!r} is too long: at most 365d", param_hint="--grace")
    made = _with_tokens(config, url, token_file, ClientTls(ca, cert, cert_key), lambda tokens: tokens.rotate(token_id, grace_s))
    if as_json:
        print_json(made.model_dump())
        return
    old = made.replaces
    say(one_line(made.token))
    end = "is revoked" if old.revoked_at is not None else f"works until {to_seconds(old.expires_at)}"
    say(f"id {made.id}, in place of {old.id}, which {end}. It is not shown again: store it now.", err=True)


@app.command("revoke")
def revoke(
    token_id: IdArgument,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke a token permanently. Running servers refuse it within a second."""
    record = _with_tokens(config, url, token_file, ClientTls(ca, cert, cert_key), lambda tokens: tokens.revoke(token_id))
    if as_json:
        print_json(record.model_dump())
    else:
        say(f"revoked {record.id}, {one_line(record.name)}")


def _with_tokens(
    config: Path | None,
    url: str | None,
    token_file: Path | None,
    tls: ClientTls,
    work: Callable[[_Tokens], Coroutine[Any, Any, _T]],
) -> _T:
    """Run an operation in the database or over the admin API; `work` awaits nothing but its argument's methods."""
    return with_either(
        ServerOptions(config, url, token_file, tls),
        _COMMAND,
        lambda plane: work(_TokensAtControlPlane(plane)),
        lambda catalog: work(_TokensInCatalog(catalog, cli_actor())),
    )
