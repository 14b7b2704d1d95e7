"""Parsing and formatting of numbers with suffixes: 10M, 500k, 1.5M."""

from __future__ import annotations

import re
from typing import Final

from tidegate.errors import SettingsError

_QUANTITY: Final = re.compile(r"([0-9]{1,18}(?:[_,][0-9]{3})*(?:\.[0-9]{1,9})?) ?([kKmMgGbB]?)", re.ASCII)
_FACTORS: Final = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000, "b": 1_000_000_000}
MAX_QUANTITY: Final = 10_000_000_000
"""More daily users than there are people on earth."""


def parse_quantity(text: str, option: str, maximum: float = MAX_QUANTITY) -> float:
    """Read a number above 0.

    Args:
        text: digits, with a fraction, followed by k, M, or G (B): 10M, 500k, 1.5M, 2_000_000.
        option: the command line option, for the error.
        maximum: largest accepted value.

    Raises:
        SettingsError: if it is not such a number, not above 0, or above `maximum`.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"{option} {text!r} is not a number; expected for example 10M, 500k, 1.5M or 2000000")
    value = float(match[1].replace("_", "").replace(",", "")) * _FACTORS[match[2].lower()]
    if not 0 < value <= maximum:
        raise SettingsError(f"{option} {text!r} is out of range; expected more than 0 and at most {short(maximum)}")
    return value


def short(value: float) -> str:
    """Format a number of 0 or more with three significant digits and k, M or G: 1.5M, 350k, 12."""
    for letter, times in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,950 is 1M, not 1000k.
        if value >= times * 0.9995:
            return f"{float(f'{value / times:.3g}'):g}{letter}"
    return f"{float(f'{value:.3g}'):g}"


def size(count: float) -> str:
    """Format bytes as decimal MB, GB or TB, with three significant digits."""
    for unit, times in (("TB", 1e12), ("GB", 1e9)):
        if count >= times:
            return f"{float(f'{count / times:.3g}'):g} {unit}"
    return f"{float(f'{count / 1e6:.3g}'):g} MB"


def rate(bits: float) -> str:
    """Format bits/s as Mbit/s or Gbit/s, with three significant digits."""
    return f"{float(f'{bits / 1e9:.3g}'):g} Gbit/s" if bits >= 1e9 else f"{float(f'{bits / 1e6:.3g}'):g} Mbit/s"
