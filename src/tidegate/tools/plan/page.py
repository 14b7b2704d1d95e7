"""A plan as one page with charts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Final

from tidegate._version import __version__
from tidegate.tools.charts import bars, head, lines, safe, table
from tidegate.tools.plan.assumptions import PRICES, USE, Assumptions
from tidegate.tools.plan.constants import Constant
from tidegate.tools.plan.fleet import CapacityPlan, make_plan
from tidegate.tools.plan.quantities import rate, short

_STEPS: Final = 41
_GROWTH: Final = 100.0


def render_page(plan: CapacityPlan, constants: Mapping[str, Constant], assumed: Assumptions) -> str:
    """Render the page as HTML that loads nothing from outside."""
    # From a tenth of the plan's users to ten times as many.
    sizes = [plan.dau / 10 * _GROWTH ** (step / (_STEPS - 1)) for step in range(_STEPS)]
    grown = [make_plan(size, constants, assumed) for size in sizes]
    labels = [f"{short(size)} users" for size in sizes]

    def growth(first: tuple[str, str], second: tuple[str, str]) -> str:
        series = [(title, [each.value(name) for each in grown]) for name, title in (first, second)]
        keys = "".join(
            f'<span class="key of-{colour}">{safe(title)}</span>'
            for colour, (_, title) in zip(("allowed", "blocked"), (first, second), strict=True)
        )
        return f"<p>{keys}</p>\n{lines(series, labels, f'{first[1]} and {second[1]} by daily users', short)}"

    costs = [(line.title.removesuffix(", a month"), line.value) for line in plan.lines if line.name.startswith("cost_")]
    bits = [(line.title, line.value) for line in plan.lines if line.name.startswith("bandwidth")]
    figures = [(line.title, line.shown, line.formula, ", ".join(line.rests_on)) for line in plan.lines]
    measured = [
        (name, each.what, each.command, each.measured_on, f"{each.value:g} {each.unit}") for name, each in constants.items()
    ]
    assumptions = [(name, assumption.description, f"{assumed.use[name]:g}") for name, assumption in USE.items()]
    assumptions += [
        (f"prices.{name}", assumption.description, f"{assumed.prices[name]:g}") for name, assumption in PRICES.items()
    ]
    return f"""{head("Tidegate plan")}
<h1>A fleet for {short(plan.dau)} daily users</h1>
<p class="sum">{plan.shown("peak_rps")} at the peak: <b>{plan.shown("instances")} instances</b>,
{plan.shown("shards")} Redis shards ({plan.shown("redis_memory")} in {plan.shown("redis_nodes")} servers),
{plan.shown("replicas")} read replicas,
<b>{plan.shown("cost")}</b> a month.</p>
<h2>Figures</h2>
{table(("figure", "value", "formula", "measured"), figures, 9)}
<pre>{escape(chr(10).join(plan.notes))}</pre>
<h2>By daily users</h2>
{growth(("instances", "instances"), ("shards", "Redis shards"))}
{growth(("cost", "limiter, $ a month"), ("cost_instances", "instances only, $ a month"))}
<p class="soft">Logarithmic scale, from a tenth of the planned users to ten times as many.</p>
<h2>Cost, $ a month</h2>
{bars(costs, "cost a month", lambda value: f"${value:,.0f}")}
<h2>Bandwidth at the peak</h2>
{bars(bits, "bandwidth", rate)}
<h2>Measured</h2>
{table(("constant", "description", "command", "date", "value"), measured, 4)}
<h2>Assumed</h2>
{table(("assumption", "description", "value"), assumptions, 2)}
<p class="soft">Prices of {safe(assumed.prices_of)}. Tidegate {__version__}.</p>
</body></html>
"""
