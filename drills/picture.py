"""Draws what clients saw of a drill over time: latency above, checks without Redis and without an answer below."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot

from drills.check_load import Seen
from drills.figures import percentile_ms
from drills.running import Mark

BIN_S: Final = 0.25


MOST_MARKS: Final = 12
"""So many are named; of more, only the lines are drawn."""


def draw(name: str, seen: Sequence[Seen], marks: Sequence[Mark], path: Path) -> None:
    """Write a PNG.

    Args:
        name: of the drill.
        seen: all checks, one at least.
        marks: what happened.
        path: where to; its directory is made.
    """
    bins: dict[int, list[Seen]] = defaultdict(list)
    for each in seen:
        bins[math.floor(each.at_s / BIN_S)].append(each)
    moments = [number * BIN_S for number in sorted(bins)]
    groups = [bins[number] for number in sorted(bins)]
    figure, (latency, trouble) = pyplot.subplots(2, 1, sharex=True, figsize=(10, 5.5), height_ratios=(2, 1), layout="constrained")
    for quantile, colour in ((0.5, "#2a8f4f"), (0.99, "#2f6db5")):
        values = [percentile_ms(group, quantile) or math.nan for group in groups]
        latency.plot(moments, values, color=colour, linewidth=1.2, label=f"p{quantile * 100:.0f}")
    latency.set_yscale("log")
    latency.set_ylabel("ms")
    latency.legend(loc="upper right")
    alone = [sum(each.degraded for each in group) / BIN_S for group in groups]
    trouble.fill_between(moments, alone, color="#e08a1e", alpha=0.6, label="decided without Redis", step="post")
    failed = [sum(each.failure is not None for each in group) / BIN_S for group in groups]
    trouble.fill_between(moments, failed, color="#c8352b", label="without an answer", step="post")
    trouble.set_ylabel("checks / s")
    trouble.set_ylim(0, max([*alone, *failed, 1.0]) * 1.05)
    trouble.set_xlabel("s")
    trouble.legend(loc="upper right")
    for mark in marks:
        for axes in (latency, trouble):
            axes.axvline(mark.at_s, color="#555555", linewidth=0.8 if len(marks) <= MOST_MARKS else 0.3, linestyle="--")
        if len(marks) > MOST_MARKS:
            continue
        latency.annotate(
            mark.what,
            (mark.at_s, 1),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=7,
            va="top",
            ha="right",
            color="#555555",
        )
    for axes in (latency, trouble):
        axes.grid(alpha=0.2)
    figure.suptitle(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
