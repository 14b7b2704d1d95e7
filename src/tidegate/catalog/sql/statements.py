"""Loads SQL statements, each with a name, from files."""

from __future__ import annotations

import re
from importlib import resources
from typing import Final

_NAME: Final = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_COMMENT: Final = re.compile(r"^--.*\n", re.MULTILINE)


def load_statements(package: str, file: str) -> dict[str, str]:
    """Read a file of statements.

    Args:
        package: package that contains the file, e.g. `tidegate.violations`.
        file: name of the file; each statement follows a line `-- name: …`.

    Returns:
        The statements by name, without comments.
    """
    _, *parts = _NAME.split(resources.files(package).joinpath(file).read_text(encoding="utf-8"))
    # A colon before a word in a comment would be parsed as a parameter.
    return {name: _COMMENT.sub("", statement).strip() for name, statement in zip(parts[::2], parts[1::2], strict=True)}
