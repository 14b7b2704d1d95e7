"""Reads and writes `[[notify]]` of a policy file, for `toml_reader` and `toml_writer`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from tidegate.policy.notify import MAX_TARGETS, NotifyTarget, require_distinct_targets
from tidegate.policy.toml_tables import TableReader

_FIELDS: Final = ("url", "secret", "at", "events", "tiers", "rules", "min_window_s")


def read_notify(reader: TableReader, raw: Mapping[str, Any]) -> tuple[NotifyTarget, ...]:
    """`[[notify]]`.

    Raises:
        PolicyError: with file, line and reason.
    """
    found = []
    for at, table in reader.tables(raw, "notify", (), MAX_TARGETS):
        reader.known(table, _FIELDS, at)
        reader.required(table, ("url", "secret"), at)
        found.append(reader.placed(lambda table=table: NotifyTarget.make(**table), at, table))  # type: ignore[misc]
    reader.placed(lambda: require_distinct_targets(found), ("notify",))
    return tuple(found)


def notify_lines(target: NotifyTarget) -> list[str]:
    """The lines of a table `[[notify]]`, which names the secret and never contains it."""
    return ["[[notify]]", *(f"{name} = {_value(value)}" for name, value in target.fields.items()), ""]


def _value(value: object) -> str:
    # JSON is TOML here, except for DEL, which TOML does not accept as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
