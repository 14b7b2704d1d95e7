"""`tidegate keys limit`: limits of one API key, permanent or until a time."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from tidegate.admin.models import KeyRead, LimitOverride, OverridesRequest
from tidegate.cli.client_tls import CaOption, CertKeyOption, CertOption, ClientTls
from tidegate.cli.common import ConfigOption, JsonOption, print_json
from tidegate.cli.control_plane import one_line
from tidegate.cli.key_access import ApiKeys, find, with_keys
from tidegate.cli.options import KeyArgument, TokenFileOption, UrlOption
from tidegate.errors import PolicyError
from tidegate.policy.limits import Limit
from tidegate.policy.quotas import fit_quotas
from tidegate.timestamps import format_timestamp, now_us, to_us
from tidegate.tools.terminal import say

TIER_LIMITS: Final = "limits"
"""What stands for the tier's own limits, in place of a rule's name."""
QUOTA: Final = "quota"
"""What stands for the tier's quotas, in place of a rule's name."""
DEFAULT: Final = "default"
"""What removes the overrides of a rule."""

UntilOption = Annotated[
    str | None,
    typer.Option(
        "--until",
        help="When the limits end by themselves: a date such as 2026-12-04 (00:00 UTC), or a time such as "
        "2026-12-04T12:00:00+01:00; default: never.",
    ),
]


def limit(
    key: KeyArgument,
    limits: Annotated[
        list[str],
        typer.Argument(
            metavar="RULE=LIMIT…",
            help="Such as '/api/*=100/minute,5000/day'; several may be given. limits=… replaces the tier's own limits, "
            "quota=… its quotas; RULE=default goes back to the tier's.",
        ),
    ],
    until: UntilOption = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give an API key limits of its own, for ever or until a time. Other limits of the key do not change.

    Limits with --until take precedence over permanent ones, and end by themselves on every server.
    """
    until_text = None if until is None else until_time(until)
    changes = [parse_change(text, until_text) for text in limits]

    async def work(keys: ApiKeys) -> KeyRead:
        record = await find(keys, key)
        return await keys.override(record, changed_overrides(record.limits, record.overrides, changes))

    record = with_keys(config, url, token_file, ClientTls(ca, cert, cert_key), work)
    if as_json:
        print_json(record.model_dump(exclude={"warnings"}))
        return
    say(f"{one_line(record.id)} of tier {one_line(record.tier)}")
    print_overrides(record.limits, record.overrides)
    for warning in record.warnings:
        say(f"warning: {one_line(warning)}", err=True)


def print_overrides(limits: Sequence[str] | None, overrides: Sequence[LimitOverride]) -> None:
    """Print the limits that a key or customer has of its own, one a line."""
    base: list[tuple[str, Sequence[str], str | None]] = [] if limits is None else [("limits over all endpoints", limits, None)]
    rows = base + [(each.rule or "limits over all endpoints", each.limits, each.until) for each in overrides if each.limits]
    rows += [
        ("quotas" if each.rule is None else f"quotas of {each.rule}", each.quotas, each.until)
        for each in overrides
        if each.quotas
    ]
    for name, texts, end in rows:
        say(f"  {one_line(name)}: {', '.join(texts or ())}{'' if end is None else f' until {end}'}")
    if not rows:
        say("  no limits of its own")


def until_time(text: str) -> str:
    """The time that `--until` names, as the admin API takes it.

    Raises:
        typer.BadParameter: if it is no time, or in the past.
    """
    try:
        if len(text) == len("2026-12-04"):
            moment = datetime.datetime.combine(datetime.date.fromisoformat(text), datetime.time(), datetime.UTC)
        else:
            moment = datetime.datetime.fromisoformat(text)
        until_us = to_us(moment)
    except ValueError:
        raise typer.BadParameter(
            f"{text[:60]!r} is not a valid time; expected a date such as 2026-12-04, or ISO 8601 with an offset",
            param_hint="--until",
        ) from None
    if until_us <= now_us():
        raise typer.BadParameter(f"{text!r} is in the past: give a later time", param_hint="--until")
    return format_timestamp(until_us)


def parse_change(text: str, until: str | None) -> tuple[str | None, LimitOverride | None]:
    """Read `RULE=LIMIT,…`.

    Returns:
        The rule, None for the tier's own limits, `QUOTA` for its quotas; and the override, None where `RULE=default` removes it.

    Raises:
        typer.BadParameter: if it is not in this form, or a limit is not valid.
    """
    # A rule's name may contain '='; a limit does not.
    name, equals, given = text.rpartition("=")
    if not equals or not name:
        raise typer.BadParameter(
            f"{text[:60]!r} has no '=': write RULE=LIMIT, such as '/api/*=100/minute'", param_hint="RULE=LIMIT"
        )
    rule = None if name == TIER_LIMITS else name
    if given == DEFAULT:
        if until is not None:
            raise typer.BadParameter(f"{text[:60]!r} removes limits, so --until has no meaning", param_hint="--until")
        return rule, None
    texts = [each.strip() for each in given.split(",")]
    try:
        if rule == QUOTA:
            quotas = [quota.text for quota in fit_quotas(texts)]
            return rule, LimitOverride(rule=None, quotas=quotas, until=until)
        for each in texts:
            Limit.parse(each)
    except PolicyError as error:
        raise typer.BadParameter(error.reason, param_hint="RULE=LIMIT") from None
    return rule, LimitOverride(rule=rule, limits=texts, until=until)


def changed_overrides(
    limits: list[str] | None, overrides: Sequence[LimitOverride], changes: Sequence[tuple[str | None, LimitOverride | None]]
) -> OverridesRequest:
    """All limits of a key or customer after a change."""
    kept: dict[tuple[str | None, bool, bool], LimitOverride] = {}
    for each in overrides:
        # One that has both is two.
        if each.limits:
            kept[each.rule, False, each.until is not None] = each.model_copy(update={"quotas": []})
        if each.quotas:
            kept[each.rule, True, each.until is not None] = each.model_copy(update={"limits": []})
    if limits is not None:
        kept[None, False, False] = LimitOverride.model_construct(rule=None, limits=limits, quotas=[], until=None)
    for name, override in changes:
        rule, is_quota = (None, True) if name == QUOTA else (name, False)
        if override is None:
            kept.pop((rule, is_quota, False), None)
            kept.pop((rule, is_quota, True), None)
        else:
            kept[rule, is_quota, override.until is not None] = override
    base = kept.pop((None, False, False), None)
    return OverridesRequest(limits=None if base is None else base.limits, overrides=list(kept.values()))
