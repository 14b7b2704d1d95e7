"""Measured constants of the formulas, read from the file that the benchmarks write."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

import msgspec


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measured figure.

    Args:
        value: in `unit`.
        unit: µs, B, MB, s or %.
        what: description.
        command: the benchmark that measured it.
        label: label of the figure in the output of `command`.
        measured_on: date, ISO 8601.
        machine: CPU, number of cores, operating system and Python version.
    """

    value: float
    unit: str
    what: str
    command: str
    label: str
    measured_on: str
    machine: str


def measured() -> Mapping[str, Constant]:
    """Read the constants of this version, by name."""
    text = resources.files("tidegate.tools.plan").joinpath("measured.json").read_bytes()
    return msgspec.json.decode(text, type=dict[str, Constant])
