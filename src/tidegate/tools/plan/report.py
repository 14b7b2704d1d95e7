"""A plan as tables in the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidegate.tools.charts import clean
from tidegate.tools.plan.assumptions import PRICES, USE, Assumptions
from tidegate.tools.plan.constants import Constant
from tidegate.tools.plan.fleet import CapacityPlan
from tidegate.tools.plan.quantities import short


def as_json(plan: CapacityPlan, constants: Mapping[str, Constant], assumed: Assumptions) -> dict[str, Any]:
    """The plan as JSON types: `dau`, `figures` by name, `lines`, `constants`, `assumptions`, `prices_of`, `notes`."""
    described = dict(USE) | {f"prices.{name}": assumption for name, assumption in PRICES.items()}
    values = dict(assumed.use) | {f"prices.{name}": value for name, value in assumed.prices.items()}
    built: dict[str, Any] = msgspec.to_builtins(
        {
            "dau": plan.dau,
            "figures": {line.name: line.value for line in plan.lines},
            "lines": plan.lines,
            "constants": constants,
            "assumptions": {
                name: {"value": value, "what": described[name].description, "replaced": name in assumed.replaced}
                for name, value in values.items()
            },
            "prices_of": assumed.prices_of,
            "notes": plan.notes,
        }
    )
    return built


def print_plan(plan: CapacityPlan, constants: Mapping[str, Constant], assumed: Assumptions, console: Console) -> None:
    """Print the plan, the measured constants that it uses, and its assumptions."""
    console.print(f"A fleet for {short(plan.dau)} daily users", style="bold")
    console.print()
    lines = _table(("figure", "value", "formula", "measured"))
    for line in plan.lines:
        lines.add_row(Text(line.title), Text(line.shown), Text(line.formula), Text(", ".join(line.rests_on)))
    console.print(lines)
    console.print()
    for note in plan.notes:
        console.print(Text(f"- {note}"))
    console.print()
    measured = _table(("measured", "value", "description", "command", "date"))
    used = {name for line in plan.lines for name in line.rests_on}
    for name, constant in constants.items():
        if name in used:
            value = f"{constant.value:g} {constant.unit}"
            measured.add_row(Text(name), Text(value), Text(constant.what), Text(constant.command), Text(constant.measured_on))
    console.print(measured)
    machines = sorted({constant.machine for constant in constants.values()})
    console.print(Text(f"Measured on {'; '.join(machines)}. To measure on your machine: make bench"), style="dim")
    console.print()
    assumptions = _table(("assumed", "value", "description"))
    for name, assumption in USE.items():
        assumptions.add_row(_marked(name, assumed), Text(f"{assumed.use[name]:g}"), Text(assumption.description))
    for name, assumption in PRICES.items():
        full = f"prices.{name}"
        assumptions.add_row(_marked(full, assumed), Text(f"{assumed.prices[name]:g}"), Text(assumption.description))
    console.print(assumptions)
    console.print(
        Text(
            f"Prices of {clean(assumed.prices_of)}. * replaced by --set or --assumptions. To replace others: "
            "--set NAME=VALUE, --assumptions FILE"
        )
    )


def _marked(name: str, assumed: Assumptions) -> Text:
    return Text(f"{name}{' *' if name in assumed.replaced else ''}")


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        narrow = column in ("value", "date")
        table.add_column(column, justify="right" if column == "value" else "left", no_wrap=narrow, overflow="fold")
    return table
