"""`tidegate plan`: estimate the size and the cost of a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.common import print_json
from tidegate.errors import SettingsError
from tidegate.tools.charts import write_page
from tidegate.tools.plan.assumptions import USE, Assumptions, assume
from tidegate.tools.plan.constants import measured
from tidegate.tools.plan.fleet import DAY_S, make_plan
from tidegate.tools.plan.page import render_page
from tidegate.tools.plan.quantities import parse_quantity
from tidegate.tools.plan.report import as_json, print_plan
from tidegate.tools.terminal import open_console

_MAX_RPS = 1e9
_MAX_KEYS = 1e12

DauOption = Annotated[
    str | None, typer.Option("--dau", metavar="N", help="Daily users: 10M, 500k, 1.5M, 2000000.", show_default=False)
]
RpsOption = Annotated[
    str | None, typer.Option("--rps", metavar="N", help="Requests/s in the peak second, if known: 35k.", show_default=False)
]
KeysOption = Annotated[
    str | None, typer.Option("--keys", metavar="N", help="Live counters, if known; default: 10 a user.", show_default=False)
]
RequestsPerUserOption = Annotated[
    str | None,
    typer.Option("--requests-per-user", metavar="N", help="Requests of a user in a day; default: 100.", show_default=False),
]
PeakFactorOption = Annotated[
    str | None,
    typer.Option(
        "--peak-factor",
        metavar="N",
        help="Requests in the peak second as a multiple of the mean; default: 3.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Replace an assumption or a price: cpu_target=0.6, prices.instance=45. Repeatable.",
        show_default=False,
    ),
]
AssumptionsOption = Annotated[
    Path | None,
    typer.Option(
        "--assumptions",
        metavar="FILE",
        help="TOML file with [use], [prices] and prices_of, the date of the prices; --set overrides it.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
HtmlOption = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write the plan to FILE as an HTML page with charts.", show_default=False),
]


def plan(
    dau: DauOption = None,
    rps: RpsOption = None,
    keys: KeysOption = None,
    requests_per_user: RequestsPerUserOption = None,
    peak_factor: PeakFactorOption = None,
    set_: SetOption = None,
    assumptions: AssumptionsOption = None,
    json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Estimate a fleet: instances, Redis shards and memory, PostgreSQL replicas, bandwidth and monthly cost.

    Start with: tidegate plan --dau 10M

    Each figure is printed with its formula and its measured constants, each constant with the command that measured it and the
    date. Values that depend on you (users, targets, prices) are assumptions: all are printed, and all can be replaced.

    The capacity of an instance is that of the machine on which the constants were measured: run `make bench` on your machine
    before you buy.
    """
    options = {
        name: parse_quantity(text, "--" + name.replace("_", "-"), USE[name].maximum)
        for name, text in (("requests_per_user", requests_per_user), ("peak_factor", peak_factor))
        if text is not None
    }
    assumed = assume(assumptions, set_ or (), options)
    peak = None if rps is None else parse_quantity(rps, "--rps", _MAX_RPS)
    users = _daily_users(dau, peak, assumed)
    counters = None if keys is None else parse_quantity(keys, "--keys", _MAX_KEYS)
    constants = measured()
    made = make_plan(users, constants, assumed, peak, counters)
    if html is not None:
        write_page(html, render_page(made, constants, assumed))
    if json:
        print_json(as_json(made, constants, assumed))
    else:
        print_plan(made, constants, assumed, open_console())


def _daily_users(dau: str | None, peak: float | None, assumed: Assumptions) -> float:
    """The users given, or those whose requests make the peak given."""
    if dau is not None:
        users = parse_quantity(dau, "--dau")
    elif peak is not None:
        users = peak / assumed.use["peak_factor"] * DAY_S / assumed.use["requests_per_user"]
    else:
        raise SettingsError("--dau or --rps is required: daily users, e.g. --dau 10M, or requests/s at the peak, e.g. --rps 35k")
    if users < 1:
        raise SettingsError(f"{users:g} daily users are too few; expected at least 1, e.g. --dau 500k")
    return users
