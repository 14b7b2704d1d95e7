"""`tidegate usage show` and `tidegate counters reset`: one caller, through the control plane, which knows its counters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import Field

from tidegate.admin.models import Plain, ResetRead, ResetRequest, RuleUsageRead, UsageRead
from tidegate.cli.client_tls import CaOption, CertKeyOption, CertOption, ClientTls, own_tls
from tidegate.cli.common import ConfigOption, JsonOption, print_json, print_rows, read_settings
from tidegate.cli.control_plane import ControlPlane, one_line
from tidegate.cli.keys import checked
from tidegate.cli.options import TokenFileOption, UrlOption
from tidegate.errors import SettingsError
from tidegate.listen_address import listener_url
from tidegate.tools.terminal import say

_COLUMNS: Final = ("rule", "mode", "counts", "limit", "window", "used", "left", "resets at")

_Text = Annotated[str, Field(max_length=5000), Plain]

CustomerOption = Annotated[str | None, typer.Option("--customer", metavar="NAME", help="A customer.")]
KeyOption = Annotated[str | None, typer.Option("--api-key", metavar="ID", help="The API key with this id.")]
IpOption = Annotated[str | None, typer.Option("--ip", help="An address.")]
SubjectOption = Annotated[str | None, typer.Option("--subject", metavar="ATTRIBUTES", help="Attributes, such as user=42.")]


def show(
    customer: CustomerOption = None,
    api_key: KeyOption = None,
    ip: IpOption = None,
    subject: SubjectOption = None,
    tier: Annotated[str | None, typer.Option("--tier", help="Tier of the customer's callers, or of the attributes.")] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a customer, an API key, an address or attributes have used of each limit and quota; charges nothing."""
    query = {"customer": customer, "api_key_id": api_key, "ip": ip, "subject": subject, "tier": tier}
    plane = _plane(url, token_file, ClientTls(ca, cert, cert_key), config, "usage")
    found = plane.read("/usage", _texts(query), UsageRead)
    if as_json:
        print_json(found.model_dump())
        return
    say(f"tier {one_line(found.tier)}; checks blocked in the last 24 h: {found.blocked_24h:,}")
    print_rows(_COLUMNS, [row for rule in found.rules for row in _rows(rule)], False, "nothing limits it")
    for name in found.not_counted:
        rule = "limits of the tier" if name is None else one_line(name)
        say(f"not shown, counts something that was not given: {rule}", err=True)
    if found.truncated:
        say(f"the tier has more rules; the first {len(found.rules):,} by priority are shown", err=True)


def reset(
    customer: CustomerOption = None,
    api_key: KeyOption = None,
    ip: IpOption = None,
    subject: SubjectOption = None,
    tier: Annotated[str | None, typer.Option("--tier", help="A tier: what its rules by tier counted.")] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Reset the counters of a customer, an API key, an address, attributes or a tier; the usage ledger keeps its units."""
    given = {"customer": customer, "api_key_id": api_key, "ip": ip, "subject": subject, "tier": tier}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise typer.BadParameter("give exactly one of --customer, --api-key, --ip, --subject and --tier")
    plane = _plane(url, token_file, ClientTls(ca, cert, cert_key), config, "counters")
    # The control plane validates it.
    done = plane.post("/counters/reset", ResetRequest.model_construct(**_texts(named)), ResetRead)
    if as_json:
        print_json(done.model_dump())
    else:
        say(f"{done.reset:,} counters reset")


def _plane(url: str | None, token_file: Path | None, tls: ClientTls, config: Path | None, command: str) -> ControlPlane:
    """The control plane at a URL, or that of the settings."""
    if url is None:
        settings = read_settings(config, has_token=token_file is not None)
        if not settings.server.admin:
            raise SettingsError("this needs the control plane, which server.admin disables: give its address there, or --url")
        url = listener_url(settings.server.admin, settings.uses_tls("admin"))
        tls = own_tls(settings, url, tls)
    return ControlPlane.at(url, token_file, config, tls, command)


def _texts(given: Mapping[str, str | None]) -> dict[str, Any]:
    """What was given, without what cannot be sent."""
    return {
        name: checked(_Text, text, f"--{name.removesuffix('_id').replace('_', '-')}")
        for name, text in given.items()
        if text is not None
    }


def _rows(rule: RuleUsageRead) -> list[tuple[object, ...]]:
    name = "(tier)" if rule.rule is None else one_line(rule.rule)
    if not rule.windows:
        return [(name, rule.mode, rule.subject, rule.limit, None, None, rule.remaining, "the counter store did not answer")]
    return [
        (name, rule.mode, rule.subject, each.limit, each.period or f"{each.window}s", each.used, each.remaining, each.resets_at)
        for each in rule.windows
    ]
