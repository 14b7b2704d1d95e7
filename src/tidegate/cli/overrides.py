"""`tidegate overrides …`: in the database, or with --url over the admin API. Both do and print the same."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, Protocol, TypeVar
from urllib.parse import quote

import typer

from tidegate.admin import subject_overrides
from tidegate.admin.models import TierName
from tidegate.admin.models.base import RuleName
from tidegate.admin.models.subject_overrides import (
    SubjectOverrideCreate,
    SubjectOverrideFields,
    SubjectOverridePage,
    SubjectOverrideRead,
)
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import NotFound
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.paging import MAX_PAGE, Page
from tidegate.cli.catalog_access import ServerOptions, cli_actor, with_either
from tidegate.cli.client_tls import CaOption, CertKeyOption, CertOption, ClientTls
from tidegate.cli.common import ConfigOption, JsonOption, print_json, print_rows
from tidegate.cli.control_plane import ControlPlane, one_line
from tidegate.cli.key_limits import UntilOption, until_time
from tidegate.cli.keys import checked
from tidegate.cli.options import TokenFileOption, UrlOption
from tidegate.errors import BadRequest, PolicyError
from tidegate.policy.attributes import parse_subject
from tidegate.policy.descriptors import entries_text
from tidegate.policy.limits import Limit
from tidegate.policy.subject_overrides import override_id
from tidegate.tools.terminal import say

app = typer.Typer(
    help="List, set and remove limits for some values of an attribute: in the database, or with --url over the admin API.",
    no_args_is_help=True,
)

_T = TypeVar("_T")
_COMMAND: Final = "overrides"

TierArgument = Annotated[str, typer.Argument(metavar="TIER", help="The tier's name.")]
RuleArgument = Annotated[str, typer.Argument(metavar="RULE", help="The rule's name; see 'tidegate rules'.")]
SubjectArgument = Annotated[
    str,
    typer.Argument(metavar="SUBJECT", help="Whose limits: user=42, 'user=test-*', or 'org=acme&user=42' for a combination."),
]


class _Overrides(Protocol):
    """What can be done with the overrides of a tier. Every method raises a TidegateError if it is refused."""

    async def page(self, rule: str | None, subject: str | None, limit: int, after: str | None) -> Page[SubjectOverrideRead]: ...
    async def create(self, request: SubjectOverrideCreate) -> SubjectOverrideRead: ...
    async def replace(self, record: SubjectOverrideRead, request: SubjectOverrideFields) -> SubjectOverrideRead: ...
    async def remove(self, record: SubjectOverrideRead) -> None: ...


class _OverridesInCatalog:
    def __init__(self, catalog: SqlCatalog, actor: str, tier: str) -> None:
        # This process caches nothing; the others are notified by the database.
        self._editor = CatalogEditor(catalog, lambda *_: None)
        self._actor = actor
        self._tier = tier

    async def page(self, rule: str | None, subject: str | None, limit: int, after: str | None) -> Page[SubjectOverrideRead]:
        return await subject_overrides.list_overrides(self._editor, self._tier, limit, after, rule, subject)

    async def create(self, request: SubjectOverrideCreate) -> SubjectOverrideRead:
        return await subject_overrides.create_override(self._editor, self._actor, self._tier, request)

    async def replace(self, record: SubjectOverrideRead, request: SubjectOverrideFields) -> SubjectOverrideRead:
        return await subject_overrides.edit_override(self._editor, self._actor, self._tier, record.id, request, {record.revision})

    async def remove(self, record: SubjectOverrideRead) -> None:
        await subject_overrides.delete_override(self._editor, self._actor, self._tier, record.id, {record.revision})


class _OverridesAtControlPlane:
    """Its methods block and await nothing."""

    def __init__(self, plane: ControlPlane, tier: str) -> None:
        self._plane = plane
        self._path = f"/tiers/{quote(tier, safe='')}/overrides"

    async def page(self, rule: str | None, subject: str | None, limit: int, after: str | None) -> Page[SubjectOverrideRead]:
        query = {"rule": rule, "subject": subject, "limit": limit, "after": after}
        page = self._plane.read(self._path, query, SubjectOverridePage)
        return Page(page.items, page.next)

    async def create(self, request: SubjectOverrideCreate) -> SubjectOverrideRead:
        return self._plane.post(self._path, request, SubjectOverrideRead)

    async def replace(self, record: SubjectOverrideRead, request: SubjectOverrideFields) -> SubjectOverrideRead:
        return self._plane.replace(f"{self._path}/{record.id}", request, record.revision, SubjectOverrideRead)

    async def remove(self, record: SubjectOverrideRead) -> None:
        self._plane.delete(f"{self._path}/{record.id}", record.revision)


def _with_overrides(
    tier: str,
    config: Path | None,
    url: str | None,
    token_file: Path | None,
    tls: ClientTls,
    work: Callable[[_Overrides], Coroutine[Any, Any, _T]],
) -> _T:
    checked(TierName, tier, "TIER")
    return with_either(
        ServerOptions(config, url, token_file, tls),
        _COMMAND,
        lambda plane: work(_OverridesAtControlPlane(plane, tier)),
        lambda catalog: work(_OverridesInCatalog(catalog, cli_actor(), tier)),
    )


@app.command("list")
def list_all(
    tier: TierArgument,
    rule: Annotated[str | None, typer.Option("--rule", help="Only overrides of this rule.")] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="Only overrides that match it, such as user=42.")] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the overrides of a tier, by rule and subject; those that have ended are listed too."""
    if subject is not None:
        _subject(subject, "--subject")

    async def work(there: _Overrides) -> list[SubjectOverrideRead]:
        return await _find(there, rule, subject)

    found = _with_overrides(tier, config, url, token_file, ClientTls(ca, cert, cert_key), work)
    found.sort(key=lambda each: (each.rule, _written(each)))
    if as_json:
        print_json([record.model_dump() for record in found])
        return
    print_rows(
        ("rule", "subject", "limits", "until", "from"),
        (
            (
                one_line(record.rule),
                one_line(_written(record)),
                list(record.limits),
                f"{record.until} (ended)" if record.ended else record.until,
                "file" if record.managed_by_file else "api",
            )
            for record in found
        ),
        False,
        "no overrides: set one with 'tidegate overrides set TIER RULE user=42 1000/minute'",
    )


@app.command("set")
def set_limits(
    tier: TierArgument,
    rule: RuleArgument,
    subject: SubjectArgument,
    limits: Annotated[list[str], typer.Argument(metavar="LIMIT…", help="Such as 1000/minute.")],
    until: UntilOption = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give some subjects of a rule other limits, or change these; consumption is kept.

    `*` in a value matches any run of characters. The exact subject takes precedence.
    """
    values = _subject(subject, "SUBJECT")
    _require_limits(limits)
    until_text = None if until is None else until_time(until)
    name = checked(RuleName, rule, "RULE")

    async def work(there: _Overrides) -> SubjectOverrideRead:
        record = await _exactly(there, name, values)
        if record is None:
            return await there.create(SubjectOverrideCreate(rule=name, subject=values, limits=limits, until=until_text))
        return await there.replace(record, SubjectOverrideFields(limits=limits, until=until_text))

    record = _with_overrides(tier, config, url, token_file, ClientTls(ca, cert, cert_key), work)
    if as_json:
        print_json(record.model_dump())
        return
    end = "" if record.until is None else f" until {record.until}"
    say(f"{one_line(_written(record))} of rule {one_line(record.rule)}: {', '.join(record.limits)}{end}")


@app.command("remove")
def remove(
    tier: TierArgument,
    rule: RuleArgument,
    subject: SubjectArgument,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Remove an override: the limits of the rule apply again, and consumption is kept."""
    values = _subject(subject, "SUBJECT")

    async def work(there: _Overrides) -> None:
        record = await _exactly(there, rule, values)
        if record is None:
            raise NotFound(
                f"rule {rule[:60]!r} of tier {tier!r} has no override for {subject[:60]!r}: see 'tidegate overrides list'"
            )
        await there.remove(record)

    _with_overrides(tier, config, url, token_file, ClientTls(ca, cert, cert_key), work)
    say(f"removed the limits of {one_line(entries_text(sorted(values.items())))}")


async def _find(there: _Overrides, rule: str | None, subject: str | None) -> list[SubjectOverrideRead]:
    found: list[SubjectOverrideRead] = []
    after: str | None = None
    while True:
        page = await there.page(rule, subject, MAX_PAGE, after)
        found += page.items
        after = page.next
        if after is None:
            return found


async def _exactly(there: _Overrides, rule: str, values: dict[str, str]) -> SubjectOverrideRead | None:
    """The override that is written for exactly these values."""
    wanted = override_id(rule, values)
    # A pattern matches its own text.
    found = await _find(there, rule, entries_text(sorted(values.items())))
    return next((each for each in found if each.id == wanted), None)


def _subject(text: str, name: str) -> dict[str, str]:
    try:
        return parse_subject(text)
    except BadRequest as error:
        raise typer.BadParameter(error.message, param_hint=name) from None


def _require_limits(texts: list[str]) -> None:
    try:
        for text in texts:
            Limit.parse(text)
    except PolicyError as error:
        raise typer.BadParameter(error.reason, param_hint="LIMIT") from None


def _written(record: SubjectOverrideRead) -> str:
    return entries_text(sorted(record.subject.items()))
