"""Panels of one look: each says what it shows and what to do, and draws its alert's threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, TypeVar

from grafana_foundation_sdk.builders import bargauge, common, piechart, stat, statetimeline, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus as prometheus_builder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import piechart as pie_options

SOURCE: Final = model.DataSourceRef(type_val="prometheus", uid="tidegate-prometheus")
"""The data source that `provisioning/datasources` makes."""
RUNBOOK: Final = "https://git.example.com/tidegate/blob/main/docs/monitoring.md"
GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"
STATUS_COLOURS: Final = {"allowed": GREEN, "blocked": RED}

Panel = timeseries.Panel | stat.Panel | piechart.Panel | bargauge.Panel | statetimeline.Panel
_P = TypeVar("_P", timeseries.Panel, stat.Panel, piechart.Panel, bargauge.Panel, statetimeline.Panel)


class Query(NamedTuple):
    """What a panel asks of Prometheus."""

    expression: str
    legend: str = ""


class Steps(NamedTuple):
    """From which value on a panel is yellow and red; where `low_is_bad`, below which."""

    yellow: float | None
    red: float | None
    low_is_bad: bool = False


def lines(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    see: str = "dashboards",
    steps: Steps | None = None,
    stacked: bool = False,
    colours: Mapping[str, str] | None = None,
    least: float | None = 0,
    most: float | None = None,
    no_value: str | None = None,
) -> timeseries.Panel:
    """Lines over time, with the steps as dashed lines.

    Args:
        title: of the panel.
        description: what it shows and what to do when it moves.
        unit: Grafana's name of it.
        queries: one or more.
        see: the heading of the runbook that goes on from here, as an anchor.
        steps: thresholds; None for none.
        stacked: whether areas are put on each other.
        colours: of series, by name.
        least: of the axis; as the values are if None.
        most: of the axis; as the values are if None.
        no_value: what stands there while there is no series.

    Returns:
        The panel, not placed yet.
    """
    panel = _common(timeseries.Panel(), title, description, unit, queries, see, steps)
    panel = (
        panel.line_width(1)
        .fill_opacity(25 if stacked else 8)
        .show_points(options.VisibilityMode.NEVER)
        .legend(_legend())
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
        .height(8)
    )
    if steps is not None:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED))
    if stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    if no_value is not None:
        panel.no_value(no_value)
    return _coloured(panel, colours)


def number(
    title: str,
    description: str,
    unit: str,
    query: Query,
    see: str = "dashboards",
    steps: Steps | None = None,
    decimals: int | None = None,
) -> stat.Panel:
    """One number, or one for each series, in the colour of the step that it has reached.

    Args:
        title: of the panel.
        description: what it shows and what to do when it moves.
        unit: Grafana's name of it.
        query: whose last value is shown.
        see: the heading of the runbook that goes on from here, as an anchor.
        steps: thresholds; None for none.
        decimals: digits behind the point; as many as fit if None.

    Returns:
        The panel, not placed yet.
    """
    panel = _common(stat.Panel(), title, description, unit, [query], see, steps)
    if decimals is not None:
        panel.decimals(decimals)
    return (
        panel.reduce_options(_last())
        .color_mode(options.BigValueColorMode.VALUE)
        .graph_mode(options.BigValueGraphMode.NONE if unit.startswith("dateTime") else options.BigValueGraphMode.AREA)
        .height(4)
    )


def pie(
    title: str,
    description: str,
    unit: str,
    query: Query,
    see: str = "dashboards",
    colours: Mapping[str, str] | None = None,
) -> piechart.Panel:
    """Shares of a whole, over the time that the dashboard shows.

    Args:
        title: of the panel.
        description: what it shows and what to do when it moves.
        unit: Grafana's name of it.
        query: asked once, for the end of that time.
        see: the heading of the runbook that goes on from here, as an anchor.
        colours: of series, by name.

    Returns:
        The panel, not placed yet.
    """
    panel = (
        _common(piechart.Panel(), title, description, unit, [query], see, None, instant=True)
        .reduce_options(_last())
        .pie_type(pie_options.PieChartType.PIE)
        .display_labels([pie_options.PieChartLabels.NAME, pie_options.PieChartLabels.PERCENT])
        .legend(
            piechart.PieChartLegendOptions()
            .display_mode(options.LegendDisplayMode.LIST)
            .placement(options.LegendPlacement.BOTTOM)
            .show_legend(True)
            .values([pie_options.PieChartLegendValues.VALUE])
        )
        .height(8)
    )
    return _coloured(panel, colours)


def bars(title: str, description: str, unit: str, query: Query, see: str = "dashboards") -> bargauge.Panel:
    """One bar for each series, the longest first if the query sorts them.

    Args:
        title: of the panel.
        description: what it shows and what to do when it moves.
        unit: Grafana's name of it.
        query: asked once, for now.
        see: the heading of the runbook that goes on from here, as an anchor.

    Returns:
        The panel, not placed yet.
    """
    return (
        _common(bargauge.Panel(), title, description, unit, [query], see, None, instant=True)
        .reduce_options(_last())
        .orientation(options.VizOrientation.HORIZONTAL)
        .display_mode(options.BarGaugeDisplayMode.BASIC)
        .min(0)
        .height(8)
    )


def states(
    title: str, description: str, query: Query, names: Mapping[int, tuple[str, str]], see: str = "dashboards"
) -> statetimeline.Panel:
    """Which state each series was in, over time.

    Args:
        title: of the panel.
        description: what it shows and what to do when it moves.
        query: whose values are whole numbers.
        names: name and colour of each state.
        see: the heading of the runbook that goes on from here, as an anchor.

    Returns:
        The panel, not placed yet.
    """
    named: dict[str, model.ValueMappingResult] = {
        str(value): model.ValueMappingResult(text=text, color=colour, index=index)
        for index, (value, (text, colour)) in enumerate(names.items())
    }
    return (
        _common(statetimeline.Panel(), title, description, "none", [query], see, None)
        .mappings([model.ValueMap(options=named)])
        .color_scheme(build.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .show_value(options.VisibilityMode.NEVER)
        .legend(_legend())
        .height(8)
    )


def up(of: str, metric: str, labels: str, see: str) -> statetimeline.Panel:
    """Whether exporters reach what they tell of, by instance.

    Args:
        of: what that is.
        metric: 1 or 0.
        labels: matchers that its series must fit.
        see: the heading of the runbook that goes on from here, as an anchor.

    Returns:
        The panel, not placed yet.
    """
    return states(
        "Up",
        f"Whether each exporter reaches its {of}.",
        Query(f"min by (instance) ({metric}{{{labels}}})", "{{instance}}"),
        {1: ("up", GREEN), 0: ("down", RED)},
        see=see,
    )


def _common(
    panel: _P,
    title: str,
    description: str,
    unit: str,
    queries: Sequence[Query],
    see: str,
    steps: Steps | None,
    instant: bool = False,
) -> _P:
    panel.title(title).description(f"{description}\n\nWhat to do: {RUNBOOK}#{see}").unit(unit).datasource(SOURCE)
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        target = prometheus_builder.Dataquery().expr(query.expression).legend_format(query.legend or "__auto").ref_id(letter)
        panel.with_target((target.instant() if instant else target.range()).datasource(SOURCE))
    panel.thresholds(build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(_steps(steps)))
    return panel


def _steps(steps: Steps | None) -> list[model.Threshold]:
    if steps is None:
        return [model.Threshold(value=None, color=GREEN)]
    named = [(value, colour) for value, colour in ((steps.yellow, YELLOW), (steps.red, RED)) if value is not None]
    if not steps.low_is_bad:
        return [
            model.Threshold(value=None, color=GREEN),
            *(model.Threshold(value=value, color=colour) for value, colour in named),
        ]
    # Below the first value it is red, and each value begins what is better.
    named.sort()
    better = [*(colour for _, colour in named), GREEN]
    return [
        model.Threshold(value=None, color=better[0]),
        *(model.Threshold(value=value, color=colour) for (value, _), colour in zip(named, better[1:], strict=True)),
    ]


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .display_mode(options.LegendDisplayMode.LIST)
        .placement(options.LegendPlacement.BOTTOM)
        .show_legend(True)
    )


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().values(False).calcs(["lastNotNull"])


def _coloured(panel: _P, colours: Mapping[str, str] | None) -> _P:
    for name, colour in (colours or {}).items():
        fixed = {"mode": "fixed", "fixedColor": colour}
        panel.override_by_name(name, [model.DynamicConfigValue(id_val="color", value=fixed)])
    return panel
