"""`tidegate plan`: how large a fleet must be, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.common import print_json
from tidegate.errors import SettingsError
from tidegate.tools.plan.assumptions import USE, assume
from tidegate.tools.plan.constants import measured
from tidegate.tools.plan.fleet import DAY_S, make_plan
from tidegate.tools.plan.page import render_page
from tidegate.tools.plan.quantities import parse_quantity
from tidegate.tools.plan.report import as_json, print_plan
from tidegate.tools.terminal import open_console

_MAX_RPS = 1e9
_MAX_KEYS = 1e12


def plan(
    dau: Annotated[
        str | None, typer.Option("--dau", metavar="N", help="Daily users: 10M, 500k, 1.5M, 2000000.", show_default=False)
    ] = None,
    rps: Annotated[
        str | None,
        typer.Option("--rps", metavar="N", help="Requests/s in the peak second, where they are known: 35k.", show_default=False),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option("--keys", metavar="N", help="Live counters, where they are known; else 10 a user.", show_default=False),
    ] = None,
    requests_per_user: Annotated[
        str | None,
        typer.Option("--requests-per-user", metavar="N", help="Requests of a user in a day; else 100.", show_default=False),
    ] = None,
    peak_factor: Annotated[
        str | None,
        typer.Option("--peak-factor", metavar="N", help="The peak second over the mean second; else 3.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Replace an assumption or a price: cpu_target=0.6, prices.instance=45. May be given several times.",
            show_default=False,
        ),
    ] = None,
    assumptions: Annotated[
        Path | None,
        typer.Option(
            "--assumptions",
            metavar="FILE",
            help="TOML with [use] and [prices], and prices_of with their date; --set goes over it.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the plan as a page with charts.", show_default=False)
    ] = None,
) -> None:
    """Work out a fleet: instances, Redis shards and memory, PostgreSQL replicas, bandwidth and monthly cost.

    Start with: tidegate plan --dau 10M

    Each figure comes with its formula and the measured constants in it, and each constant with the command that measured it and
    the day. What cannot be measured for you (your users, your prices) is an assumption that you can replace; all are printed.

    The capacity of an instance is that of the machine that the constants were measured on: measure on yours with `make bench`
    before you buy.
    """
    given = {
        name: parse_quantity(text, "--" + name.replace("_", "-"), USE[name].most)
        for name, text in (("requests_per_user", requests_per_user), ("peak_factor", peak_factor))
        if text is not None
    }
    assumed = assume(assumptions, set_ or (), given)
    peak = None if rps is None else parse_quantity(rps, "--rps", _MAX_RPS)
    if dau is not None:
        users = parse_quantity(dau, "--dau")
    elif peak is not None:
        # As many as ask so much.
        users = peak / assumed.use["peak_factor"] * DAY_S / assumed.use["requests_per_user"]
    else:
        raise SettingsError("how large? Give --dau (daily users, as in --dau 10M) or --rps (requests/s at the peak)")
    if users < 1:
        raise SettingsError(f"that is {users:g} daily users: give at least 1, as in --dau 500k")
    counters = None if keys is None else parse_quantity(keys, "--keys", _MAX_KEYS)
    constants = measured()
    made = make_plan(users, constants, assumed, peak, counters)
    if html is not None:
        try:
            html.write_text(render_page(made, constants, assumed), encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"--html {html} cannot be written: {error.strerror or error}") from None
    if json:
        print_json(as_json(made, constants, assumed))
    else:
        print_plan(made, constants, assumed, open_console())
