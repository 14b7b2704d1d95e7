"""Numbers as people write them: 10M, 500k, 1.5M; and as they read them."""

from __future__ import annotations

import re
from typing import Final

from tidegate.errors import SettingsError

_WRITTEN: Final = re.compile(r"([0-9]{1,18}(?:[_,][0-9]{3})*(?:\.[0-9]{1,9})?) ?([kKmMgGbB]?)", re.ASCII)
_TIMES: Final = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000, "b": 1_000_000_000}
MOST: Final = 10_000_000_000
"""More daily users than there are people."""


def parse_quantity(text: str, option: str, most: float = MOST) -> float:
    """Read a number above 0.

    Args:
        text: digits, with a fraction, and k, M, or G (B) behind: 10M, 500k, 1.5M, 2_000_000.
        option: that it was given with, for the error.
        most: that makes sense.

    Returns:
        The number.

    Raises:
        SettingsError: if it is no such number, or not above 0, or above `most`.
    """
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        raise SettingsError(f"{option} {text!r} is no number: write 10M, 500k, 1.5M or 2000000")
    value = float(found[1].replace("_", "").replace(",", "")) * _TIMES[found[2].lower()]
    if not 0 < value <= most:
        raise SettingsError(f"{option} {text!r} is out of range: give more than 0 and at most {short(most)}")
    return value


def short(value: float) -> str:
    """A number with its thousands, millions or billions as a letter.

    Args:
        value: 0 or more.

    Returns:
        Three significant digits: 1.5M, 350k, 12.
    """
    for letter, times in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,950 is 1M, not 1000k.
        if value >= times * 0.9995:
            return f"{float(f'{value / times:.3g}'):g}{letter}"
    return f"{float(f'{value:.3g}'):g}"


def size(count: float) -> str:
    """Bytes as MB, GB or TB of powers of ten.

    Args:
        count: bytes.

    Returns:
        Three significant digits.
    """
    for unit, times in (("TB", 1e12), ("GB", 1e9)):
        if count >= times:
            return f"{float(f'{count / times:.3g}'):g} {unit}"
    return f"{float(f'{count / 1e6:.3g}'):g} MB"


def rate(bits: float) -> str:
    """Bits a second as Mbit/s or Gbit/s.

    Args:
        bits: a second.

    Returns:
        Three significant digits.
    """
    return f"{float(f'{bits / 1e9:.3g}'):g} Gbit/s" if bits >= 1e9 else f"{float(f'{bits / 1e6:.3g}'):g} Mbit/s"
