"""`tidegate check --explain`: why a request gets its answer, from the control plane."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tidegate.admin.models.explain import ExplainedCounter, ExplainRead
from tidegate.cli.client_tls import ClientTls, own_tls
from tidegate.cli.common import print_json, read_settings
from tidegate.cli.control_plane import ControlPlane, one_line
from tidegate.errors import SettingsError
from tidegate.listen_address import listener_url
from tidegate.policy.descriptors import escaped
from tidegate.policy.key_format import hash_api_key
from tidegate.tools.terminal import say

_MARKS = {"answers": "->", "watches": " ~", "outranked": "  ", "not_matched": "  "}


def explain_check(
    key: str,
    query: Mapping[str, str | int | None],
    attributes: Mapping[str, str],
    *,
    url: str | None,
    token_file: Path | None,
    tls: ClientTls,
    config: Path | None,
    as_json: bool,
) -> int:
    """Print why a request gets its answer. Charges nothing.

    Args:
        key: the API key, of which only the id is sent; `-` for none.
        query: parameters of `GET /admin/v1/explain`.
        url: URL of the control plane; None for that of the settings.
        token_file: file with a token of the control plane; None for the token of the settings.
        tls: given on the command line.
        config: settings file.
        as_json: JSON instead of text.

    Returns:
        0 if the request would be allowed, 1 if it would be denied, 2 if it would be refused as invalid or that is not known.
    """
    # With a URL too: the API key is hashed here, as [keys] says.
    settings = read_settings(config, has_token=token_file is not None)
    if url is None:
        if not settings.server.admin:
            raise SettingsError("--explain needs the control plane, which server.admin disables: give its address there")
        url = listener_url(settings.server.admin, settings.uses_tls("admin"))
        tls = own_tls(settings, url, tls)
    plane = ControlPlane.at(url, token_file, config, tls, command="rules")
    named = {
        **query,
        "api_key_id": None if key == "-" else hash_api_key(key)[:24],
        "attributes": "&".join(f"{name}={escaped(value)}" for name, value in attributes.items()) or None,
    }
    found = plane.read("/explain", named, ExplainRead)
    if as_json:
        print_json(found.model_dump())
    else:
        for line in _lines(found):
            say(one_line(line))
    return 2 if found.allowed is None else 0 if found.allowed else 1


def _lines(found: ExplainRead) -> list[str]:
    lines = [f"{found.method} {found.path}: {found.answer}", f"caller: {found.caller.why}", f"rules of tier {found.caller.tier}:"]
    for each in found.rules:
        lines.append(f"  {_MARKS.get(each.result, '  ')} {each.rule}: {each.reason}")
    if found.left_out:
        lines.append(f"     and {found.left_out} more, none of which matches")
    if found.counters:
        lines.append("counters now:")
    lines += [f"     {_counter(each)}" for each in found.counters]
    return lines


def _counter(each: ExplainedCounter) -> str:
    name = (each.rule or "(tier)") + (" (shadow)" if each.mode == "shadow" else "")
    if each.problem is not None:
        return f"{name}: {each.problem}"
    if each.remaining is None:
        return f"{name} of {each.subject}: the counter store did not answer"
    windows = (
        "; ".join(f"{window.used} of {text} used" for window, text in zip(each.windows, each.limits, strict=False))
        or f"{each.remaining} of {each.limit} left"
    )
    return f"{name} of {each.subject}: {windows}"
