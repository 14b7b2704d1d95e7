"""Values of a policy's fields: checked, and shown in messages."""

from __future__ import annotations

import enum
from typing import TypeVar

from tidegate.errors import PolicyError, clip

_E = TypeVar("_E", bound=enum.StrEnum)


def short(value: object) -> str:
    """The representation of a value from a policy, short enough for a message: at most 60 characters."""
    return clip(value, 60)


def member_of(kind: type[_E], value: object, field: str) -> _E:
    """The member of an enumeration that a policy names.

    Raises:
        PolicyError: naming the field, the value and the choices.
    """
    try:
        return kind(str(value))
    except ValueError:
        choices = ", ".join(member.value for member in kind)
        raise PolicyError(f"{field} {short(value)} is not known: use one of {choices}") from None
