"""Dashboards of one look: rows of lines of panels, choices at the top, marks on the time axis."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from dashboards.panels import BLUE, RED, SOURCE, Panel

WIDTH: Final = 24
"""Columns of a dashboard."""


@dataclass(frozen=True)
class Row:
    """Panels under one heading.

    Attributes:
        title: the heading.
        lines: panels beside each other, in lines below each other; those of a line share its width.
    """

    title: str
    lines: Sequence[Sequence[Panel]]


class Event(model.AnnotationQuery, Builder[model.AnnotationQuery]):
    """Marks on the time axis where an expression is 1 or more, with the fields that only Prometheus' annotations have.

    Args:
        name: of the switch at the top of the dashboard.
        expression: 1 or more while it happens.
        title: of a mark; labels in double braces.
        colour: of a mark.
    """

    def __init__(self, name: str, expression: str, title: str, colour: str) -> None:
        super().__init__(name=name, datasource=SOURCE, icon_color=colour, expr=expression, built_in=None)
        self._title = title

    def to_json(self) -> dict[str, object]:
        """As Grafana keeps it."""
        return {**super().to_json(), "titleFormat": self._title, "step": "15s"}

    def build(self) -> model.AnnotationQuery:
        """Itself: it is what the dashboard's builder asks for."""
        return self


POLICY_CHANGES: Final = Event("Policy changes", "max(changes(rate_limiter_policy_version[1m])) > 0", "Policy changed", BLUE)
ALERTS: Final = Event(
    "Alerts", 'max by (alertname) (ALERTS{alertstate="firing", severity=~"critical|warning"})', "{{alertname}}", RED
)


def choice(name: str, label: str, query: str) -> build.QueryVariable:
    """A choice at the top of the dashboard; all at first, and `.+` stands for all.

    Args:
        name: by which expressions name it, behind a `$`.
        label: what is read beside it.
        query: `label_values(SERIES, LABEL)`.

    Returns:
        The variable.
    """
    return (
        build.QueryVariable(name)
        .label(label)
        .query({"query": query, "refId": name})
        .datasource(SOURCE)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(model.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def dashboard(
    name: str,
    title: str,
    description: str,
    rows: Sequence[Row],
    choices: Sequence[build.QueryVariable] = (),
    since: str = "now-6h",
) -> build.Dashboard:
    """Put rows below each other, and the panels of each line beside each other.

    Args:
        name: of the file; `tidegate-NAME` is the uid.
        title: of the dashboard.
        description: which question it answers.
        rows: its panels.
        choices: its variables.
        since: where the time axis begins at first.

    Returns:
        The dashboard.
    """
    made = (
        build.Dashboard(title)
        .uid(f"tidegate-{name}")
        .description(description)
        .tags(["tidegate"])
        .timezone("browser")
        .time(since, "now")
        .refresh("30s")
        .readonly()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            build.DashboardLink("Tidegate")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["tidegate"])
            .as_dropdown(True)
            .keep_time(True)
        )
        .annotations([POLICY_CHANGES, ALERTS])
    )
    for variable in choices:
        made.with_variable(variable)
    number_of = 0
    for row in rows:
        number_of += 1
        made.with_row(build.Row(row.title).id(number_of))
        for line in row.lines:
            for panel in line:
                number_of += 1
                made.with_panel(panel.id(number_of).span(WIDTH // len(line)))
    return made


def to_json(made: build.Dashboard) -> str:
    """The file of a dashboard.

    Args:
        made: the dashboard.

    Returns:
        JSON, the same each time.
    """
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
