"""SQL in files of its own: every statement has a name, and one home."""

from __future__ import annotations

import re
from importlib import resources
from typing import Final

_NAME: Final = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_COMMENT: Final = re.compile(r"^--.*\n", re.MULTILINE)


def load_statements(package: str, file: str) -> dict[str, str]:
    """Read a file of statements.

    Args:
        package: the package that the file lies in, such as `tidegate.violations`.
        file: its name; before each statement stands a line `-- name: …`.

    Returns:
        The statements by their names, without the lines of comment.
    """
    _, *parts = _NAME.split(resources.files(package).joinpath(file).read_text(encoding="utf-8"))
    # What a comment says in passing, such as a colon before a word, is not to be taken for a parameter.
    return {name: _COMMENT.sub("", statement).strip() for name, statement in zip(parts[::2], parts[1::2], strict=True)}
