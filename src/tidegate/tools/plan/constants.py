"""The measured constants that formulas rest on: read from the file that the benches write, never typed in here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

import msgspec


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measured figure.

    Args:
        value: in `unit`.
        unit: µs, B, MB, s or %.
        what: it is of.
        command: that measured it.
        label: of the figure in that command's output.
        measured_on: date, ISO 8601.
        machine: it was measured on.
    """

    value: float
    unit: str
    what: str
    command: str
    label: str
    measured_on: str
    machine: str


def measured() -> Mapping[str, Constant]:
    """Read the constants of this version.

    Returns:
        By name.
    """
    text = resources.files("tidegate.tools.plan").joinpath("measured.json").read_bytes()
    return msgspec.json.decode(text, type=dict[str, Constant])
