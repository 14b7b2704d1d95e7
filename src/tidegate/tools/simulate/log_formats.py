"""Formats of access logs: detection, and the parser of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tidegate.errors import SettingsError
from tidegate.tools.simulate.log_clients import Clients
from tidegate.tools.simulate.log_durations import Durations
from tidegate.tools.simulate.log_records import (
    FIELDS,
    RecordReader,
    W3cRecords,
    csv_columns,
    csv_record,
    json_record,
    require_columns,
)
from tidegate.tools.simulate.log_request import MAX_NAME, Directive, NoAddress, Parse, Request
from tidegate.tools.simulate.log_text import COMBINED_FIELDS, bare_line, text_format, text_parser
from tidegate.tools.simulate.log_times import Malformed

__all__ = [
    "COMBINED_FIELDS",
    "FIELDS",
    "FORMATS",
    "MAX_NAME",
    "Directive",
    "NoAddress",
    "Parse",
    "Request",
    "csv_columns",
    "detect",
    "parser_of",
]

_TIMES: Final = {name.lower() for name in FIELDS["time"]}
_PATHS: Final = {name.lower() for name in (*FIELDS["path"], *FIELDS["request"])}

FORMATS: Final = ("combined", "common", "json", "csv", "w3c", "alb", "haproxy", "envoy")


def parser_of(
    name: str,
    subject: str,
    key_field: str | None,
    fields: Mapping[str, str] | None = None,
    header: Sequence[str] = (),
    clients: Clients | None = None,
    attributes: Sequence[str] = (),
    cost_field: str | None = None,
    durations: Durations | None = None,
) -> Parse:
    """The parser of a format.

    Args:
        name: one of `FORMATS`.
        subject: ip, user, or the name of a field.
        key_field: field with the API key, None for the default ones.
        fields: for json, csv and w3c: other names for keys of `FIELDS`; case-insensitive, `a.b` for b inside a.
        header: for csv: the names of its columns.
        clients: parses the client address; None to trust proxies on loopback addresses.
        attributes: the field of each attribute of the caller; its values are the request's `attributes`, in this order.
        cost_field: field with the units of a request; None if each costs 1.
        durations: where the duration of a request is; None if it is not needed.

    Returns:
        A function from a line to its request. It raises `Malformed`, or `Directive` for a line that belongs to the format.

    Raises:
        SettingsError: if the log has no such field.
    """
    clients = clients or Clients()
    if name not in ("json", "csv", "w3c"):
        if cost_field is not None:
            raise SettingsError(f"a log in the format {name} has no costs, so no {cost_field!r}: give a JSON, CSV or W3C log")
        fields_of_text = [field.lower() for field in attributes]
        return text_parser(name, subject.lower(), key_field.lower() if key_field else None, clients, fields_of_text, durations)
    names = dict(FIELDS) | {role: (field,) for role, field in (fields or {}).items()}
    if key_field:
        names["key"] = (key_field,)
    names["subject"] = names.get(subject.lower(), (subject,))
    if name == "json":
        inner = _inner_parser(names, subject, clients, attributes, cost_field, durations)
        read = RecordReader(names, clients, inner, attributes, cost_field, durations)
        return lambda line: read(json_record(line if line.startswith("{") else bare_line(line)))
    named = [*(names[role] for role in fields or {}), names["subject"], *((names["key"],) if key_field else ())]
    named += [(field,) for field in (*attributes, cost_field, durations and durations.field) if field]
    read_row = RecordReader(names, clients, attributes=attributes, cost_field=cost_field, durations=durations)
    if name == "w3c":
        records = W3cRecords(lambda columns: require_columns(columns, named))
        return lambda line: read_row(records(line))
    columns = [column.strip().lower() for column in header]
    require_columns(columns, named)
    return lambda line: read_row(csv_record(line, columns))


def detect(line: str) -> str | None:
    """Detect the format from one line: one of `FORMATS` (for csv the line is the header), or None."""
    text = bare_line(line)
    if text.startswith("{"):
        try:
            json_record(text)
        except Malformed:
            return None
        return "json"
    if text.lower().startswith(("#fields:", "#version:", "#software:")):
        return "w3c"
    if name := text_format(text):
        return name
    columns = {column.lower() for column in csv_columns(line)}
    if columns & _TIMES and columns & _PATHS:
        return "csv"
    return None


def _inner_parser(
    names: Mapping[str, tuple[str, ...]],
    subject: str,
    clients: Clients,
    attributes: Sequence[str],
    cost_field: str | None,
    durations: Durations | None,
) -> Callable[[str], Request]:
    """Parses the text field of a JSON record: nested JSON, one level deep, or a line of text."""
    read = RecordReader(names, clients, attributes=attributes, cost_field=cost_field, durations=durations)
    parsers: dict[str, Parse] = {}

    def parse(text: str) -> Request:
        if text.lstrip().startswith("{"):
            return read(json_record(text))
        name = text_format(bare_line(text))
        if name is None:
            raise Malformed("no field with a path, and the text in it is not a line of a known format")
        if name not in parsers:
            parsers[name] = text_parser(name, subject.lower(), None, clients, [field.lower() for field in attributes], durations)
        return parsers[name](text)

    return parse
