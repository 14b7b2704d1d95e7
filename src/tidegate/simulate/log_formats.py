"""One line of an access log → one request. Formats: common and combined (Apache, nginx), JSON lines, CSV with a header."""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from tidegate.limits import US_PER_S

FORMATS: Final = ("combined", "common", "json", "csv")

TIME_FIELDS: Final = ("time_iso8601", "@timestamp", "timestamp", "time", "msec", "ts", "time_local", "datetime", "date")
IP_FIELDS: Final = ("remote_addr", "client_ip", "ip", "remote_ip", "clientip", "host")
USER_FIELDS: Final = ("remote_user", "user", "username", "user_id")
METHOD_FIELDS: Final = ("request_method", "method", "verb")
TARGET_FIELDS: Final = ("request_uri", "uri", "path", "url", "target")
REQUEST_FIELDS: Final = ("request", "request_line")
KEY_FIELDS: Final = ("http_x_api_key", "x_api_key", "api_key", "key")


class Request(NamedTuple):
    """One request of a log; ordered by time, then by the rest, so that equal times have one order whatever the log's.

    Args:
        at_us: µs since the epoch.
        ip: client, as logged; empty where unknown.
        method: upper-case HTTP method.
        target: path with query, as logged.
        subject: value of the field that names the caller; empty where it is missing.
        api_key: as logged; empty where there is none.
    """

    at_us: int
    ip: str
    method: str
    target: str
    subject: str
    api_key: str


class Malformed(Exception):
    """A line that is no request; the message says why."""


Parse: TypeAlias = Callable[[str], Request]

_REQUEST_PART = r"[^\"\\]*(?:\\.[^\"\\]*)*"
# Host, user and time up to the request; the user may hold spaces, so it ends where " [" begins.
_COMBINED: Final = re.compile(rf'(\S+) \S+ ([^\[]*?) \[([^\]]{{20,40}})\] "({_REQUEST_PART})" (?:\d{{3}}|-) (?:\d+|-)')
_TAIL: Final = re.compile(rf' "({_REQUEST_PART})" "({_REQUEST_PART})"')
_new: Final = tuple.__new__
_USUAL_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_METHOD: Final = re.compile(r"[A-Z][A-Z_-]{0,31}", re.ASCII)
_APACHE_TIME: Final = re.compile(r"(\d{2})/([A-Z][a-z]{2})/(\d{4}):(\d{2}):(\d{2}):(\d{2}) ([+-])(\d{2})(\d{2})", re.ASCII)
_MONTHS: Final = {
    name: number
    for number, name in enumerate(["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"], 1)
}
_MINUTES_KEPT: Final = 10_000


class _ApacheTimes:
    """`17/May/2015:10:05:03 +0000` → µs; each minute is worked out once."""

    def __init__(self) -> None:
        self._minutes: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        start = self._minutes.get(text[:17] + text[20:])
        if start is None:
            start = self._work_out(text)
        try:
            second = int(text[18:20])
        except ValueError:
            raise Malformed(f"the time {text!r} is not understood") from None
        if not 0 <= second <= 60:
            raise Malformed(f"the time {text!r} is not understood")
        return start + second * US_PER_S

    def _work_out(self, text: str) -> int:
        found = _APACHE_TIME.fullmatch(text)
        if found is None or found[2] not in _MONTHS:
            raise Malformed(f"the time {text!r} is not understood")
        day, month, year, hour, minute = int(found[1]), _MONTHS[found[2]], int(found[3]), int(found[4]), int(found[5])
        offset = datetime.timedelta(hours=int(found[8]), minutes=int(found[9]))
        try:
            moment = datetime.datetime(year, month, day, hour, minute, tzinfo=datetime.UTC)
            moment = moment - offset if found[7] == "+" else moment + offset
        except (ValueError, OverflowError):
            raise Malformed(f"the time {text!r} is no moment") from None
        if len(self._minutes) >= _MINUTES_KEPT:
            self._minutes.clear()
        start = self._minutes[text[:17] + text[20:]] = _us_of(moment)
        return start


def parser_of(name: str, subject: str, key_field: str | None, header: Sequence[str] = ()) -> Parse:
    """The parser of a format.

    Args:
        name: combined, common, json or csv.
        subject: ip, user, or the name of a field.
        key_field: field with the API key, None where there is none.
        header: for csv: the names of its columns.

    Returns:
        A function from a line to its request that raises `Malformed`.
    """
    if name in ("combined", "common"):
        return _combined(subject, key_field)
    read = _record_reader(subject, key_field)
    if name == "csv":
        columns = [column.strip().lower() for column in header]
        return lambda line: read(_csv_record(line, columns))
    return lambda line: read(_json_record(line))


def detect(line: str) -> tuple[str, tuple[str, ...]] | None:
    """Tell a log's format by one of its lines.

    Args:
        line: the line.

    Returns:
        The format's name and, for csv, its columns; None where the line tells nothing.
    """
    text = line.strip()
    if text.startswith("{"):
        try:
            return ("json", ()) if isinstance(msgspec.json.decode(text), dict) else None
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
    if found := _COMBINED.match(text):
        return ("combined" if _TAIL.match(text, found.end()) else "common"), ()
    columns = tuple(column.strip().lower() for column in next(csv.reader([text]), []))
    if len(columns) >= 2 and set(columns) & set(TIME_FIELDS) and set(columns) & {*TARGET_FIELDS, *REQUEST_FIELDS}:
        return "csv", columns
    return None


def _combined(subject: str, key_field: str | None) -> Parse:
    times = _ApacheTimes()
    match = _COMBINED.match
    own_field = {"ip": 1, "user": 2}.get(subject)
    tail_fields = {"referer": 1, "agent": 2, "user_agent": 2}

    def parse(line: str) -> Request:
        found = match(line)
        if found is None:
            raise Malformed("not a line of a common or combined log")
        ip, user, time_text, request = found.groups()
        parts = request.split(" ")
        if len(parts) not in (2, 3) or not (parts[0] in _USUAL_METHODS or _METHOD.fullmatch(parts[0])):
            raise Malformed(f"no HTTP request in {request[:60]!r}")
        named = key = ""
        if own_field is None or key_field is not None:
            tail = _TAIL.match(line, found.end())
            fields = {"ip": ip, "user": user, **({name: tail[number] for name, number in tail_fields.items()} if tail else {})}
            named, key = fields.get(subject, ""), fields.get(key_field or "", "")
        elif own_field == 2:
            named = user
        else:
            named = ip
        # A named tuple's own constructor costs five times this.
        return _new(Request, (times(time_text), ip, parts[0], parts[1], "" if named == "-" else named, "" if key == "-" else key))

    return parse


def _record_reader(subject: str, key_field: str | None) -> Callable[[Mapping[str, Any]], Request]:
    def read(record: Mapping[str, Any]) -> Request:
        time_value = _first(record, TIME_FIELDS)
        if time_value is None:
            raise Malformed("no field with a time: one of " + ", ".join(TIME_FIELDS))
        method, target = _first(record, METHOD_FIELDS), _first(record, TARGET_FIELDS)
        request = _first(record, REQUEST_FIELDS)
        if target is None and isinstance(request, str):
            parts = request.split(" ")
            if len(parts) not in (2, 3):
                raise Malformed(f"no HTTP request in {request[:60]!r}")
            method, target = parts[0], parts[1]
        if not isinstance(target, str):
            raise Malformed("no field with a path: one of " + ", ".join(TARGET_FIELDS))
        method = str(method or "GET").upper()
        if not _METHOD.fullmatch(method):
            raise Malformed(f"{method[:40]!r} is no HTTP method")
        ip = _text(_first(record, IP_FIELDS))
        named = {"ip": lambda: ip, "user": lambda: _text(_first(record, USER_FIELDS))}.get(
            subject, lambda: _text(record.get(subject))
        )()
        key = _text(record.get(key_field)) if key_field else _text(_first(record, KEY_FIELDS))
        return Request(_moment_us(time_value), ip, method, target, named, key)

    return read


def _json_record(line: str) -> Mapping[str, Any]:
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise Malformed("a JSON line must be an object")
    return record


def _csv_record(line: str, columns: list[str]) -> Mapping[str, Any]:
    try:
        values = next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise Malformed(f"not CSV: {error}") from None
    if len(values) != len(columns):
        raise Malformed(f"{len(values)} columns where the header has {len(columns)}")
    return dict(zip(columns, values, strict=True))


_apache_time: Final = _ApacheTimes()


def _moment_us(value: object) -> int:
    """A moment: ISO 8601, seconds or milliseconds since the epoch, or as Apache writes it."""
    try:
        if isinstance(value, str) and not _is_number(value):
            if "/" in value:
                return _apache_time(value.strip("[]"))
            moment = datetime.datetime.fromisoformat(value)
            # A time without offset is UTC, so that the result is the same on every machine.
            return _us_of(moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC))
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            seconds = float(value)
            return round(seconds * (1_000 if seconds > 1e11 else US_PER_S))
    except (ValueError, OverflowError):
        pass  # told below, with the value
    raise Malformed(f"the time {str(value)[:40]!r} is not understood")


def _us_of(moment: datetime.datetime) -> int:
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    us = (since.days * 86_400 + since.seconds) * US_PER_S + since.microseconds
    if us < 0:
        raise Malformed(f"the time {moment.isoformat()} lies before 1970")
    return us


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        value = record.get(name)
        if value is not None and value != "":
            return value
    return None


def _text(value: object) -> str:
    return "" if value is None or value == "-" else str(value)
