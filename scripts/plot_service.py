"""Draw what Prometheus recorded of Tidegate: checks, latency, errors, and when a Redis was down.

python scripts/plot_service.py http://prometheus1:9090 service.png --minutes 60
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 300
"""About as many as can be told apart on the picture."""
TIMEOUT_S = 30
OBJECTIVE_MS = 10
GREEN, RED, BLUE, ORANGE = "#2a8f4f", "#c8352b", "#2f6db5", "#e08a1e"


class Series(NamedTuple):
    """One line: its name, minutes since the beginning, and values."""

    name: str
    minutes: list[float]
    values: list[float]


class Source:
    """A Prometheus over a span of time.

    Args:
        minutes: of the span, which ends now.

    Attributes:
        start: of the span, s since the epoch.
    """

    def __init__(self, url: str, minutes: float) -> None:
        self._url = url.rstrip("/")
        self._end = time.time()
        self.start = self._end - minutes * 60
        self._step = max(1.0, minutes * 60 / POINTS)

    def ask(self, expression: str, label: str = "") -> list[Series]:
        """Ask for an expression over the span.

        Args:
            expression: in PromQL.
            label: that names each series.

        Returns:
            Its series, by name.

        Raises:
            SystemExit: with a message, if the server does not answer or refuses the expression.
        """
        parameters = {"query": expression, "start": self.start, "end": self._end, "step": self._step}
        url = f"{self._url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                found = json.load(answer)["data"]["result"]
        except (OSError, ValueError, KeyError) as error:
            said = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
            sys.exit(f"plot_service: {self._url} does not answer {expression!r}: {error} {said}".rstrip())
        return sorted(
            Series(
                each["metric"].get(label, ""),
                [(float(at) - self.start) / 60 for at, _ in each["values"]],
                [float(value) for _, value in each["values"]],
            )
            for each in found
        )


def draw(source: Source, window: str, path: Path) -> None:
    """Draw the picture.

    Args:
        source: what is asked.
        window: of rates, such as `1m`; four scrapes or more.
        path: of the PNG.

    Raises:
        SystemExit: with a message, if nothing was recorded.
    """
    requests = source.ask(f"sum by (status) (rate(rate_limiter_requests_total[{window}]))", "status")
    if not requests:
        sys.exit("plot_service: no rate_limiter_requests_total in this time: is this the Prometheus that scrapes Tidegate?")
    # Loaded when there is something to draw: that takes seconds.
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, (checks, latency, errors) = pyplot.subplots(3, 1, sharex=True, figsize=(10, 7), height_ratios=(3, 2, 2))
    for each, colour in zip(requests, (GREEN, RED), strict=False):
        _line(checks, each, colour)
    _finish(checks, "checks a second")

    for quantile, name, colour in ((0.5, "P50", BLUE), (0.99, "P99", ORANGE)):
        buckets = f"sum by (le) (rate(rate_limiter_latency_seconds_bucket[{window}]))"
        for each in source.ask(f"1000 * histogram_quantile({quantile}, {buckets})"):
            _line(latency, each._replace(name=name), colour)
    latency.axhline(OBJECTIVE_MS, color=RED, linestyle="--", linewidth=0.8, label="objective")
    latency.set_yscale("log")
    _finish(latency, "latency, ms")

    for each in source.ask(f"sum by (type) (rate(rate_limiter_errors_total[{window}]))", "type"):
        if max(each.values) > 0:
            _line(errors, each)
    _finish(errors, "errors a second")

    for axes in (checks, latency, errors):
        down = source.ask("count(redis_up == 0) or vector(0)")[0]
        axes.fill_between(
            down.minutes,
            0,
            1,
            where=[value > 0 for value in down.values],
            transform=axes.get_xaxis_transform(),
            color="0.88",
        )
    began = datetime.fromtimestamp(source.start, UTC)
    errors.set_xlabel(f"minutes since {began:%Y-%m-%d %H:%M:%S} UTC; grey: a Redis is down")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw.

    Args:
        arguments: of the command line; those of this process if None.
    """
    parser = argparse.ArgumentParser(description="Draw what Prometheus recorded of Tidegate.")
    parser.add_argument("url", help="of Prometheus, such as http://prometheus1:9090")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--minutes", type=float, default=60, help="how long ago it begins (default: 60)")
    parser.add_argument("--window", default="1m", help="of rates: four scrapes or more (default: 1m)")
    given = parser.parse_args(arguments)
    if given.minutes <= 0:
        parser.error(f"--minutes is {given.minutes}: give a positive number")
    draw(Source(given.url, given.minutes), given.window, given.picture)


def _line(axes: Axes, series: Series, colour: str | None = None) -> None:
    axes.plot(series.minutes, series.values, label=series.name, color=colour, linewidth=1.2)


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(color="0.9", linewidth=0.6)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)


if __name__ == "__main__":
    main()
