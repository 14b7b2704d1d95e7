"""One line of an access log → one request. Formats: common and combined (Apache, nginx), JSON lines, CSV with a header."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from tidegate.errors import SettingsError
from tidegate.paths import MAX_PATH_BYTES
from tidegate.simulate.log_times import ApacheTimes, Malformed, moment_us

FORMATS: Final = ("combined", "common", "json", "csv")
FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "time": ("time_iso8601", "@timestamp", "timestamp", "time", "msec", "ts", "time_local", "datetime", "date"),
    "ip": ("remote_addr", "client_ip", "ip", "remote_ip", "clientip", "host"),
    "user": ("remote_user", "user", "username", "user_id"),
    "method": ("request_method", "method", "verb"),
    "path": ("request_uri", "uri", "path", "url", "target"),
    "request": ("request", "request_line"),
    "key": ("http_x_api_key", "x_api_key", "api_key"),
}
"""What a JSON or CSV log may call each thing, where nothing else was said."""
COMBINED_FIELDS: Final = ("ip", "user", "referer", "agent")

MAX_NAME: Final = 255
"""Most characters of an address or a caller's name: more than a host name has. What is counted stays bounded by it."""
_MAX_KEY: Final = 128


class Request(NamedTuple):
    """One request of a log; ordered by time, then by the rest, so that equal times have one order whatever the log's.

    Args:
        at_us: µs since the epoch.
        ip: client, as logged, at most 255 characters; empty where unknown.
        method: upper-case HTTP method.
        path: without query, as logged, escapes of the log taken off; cut where longer than any path may be.
        subject: value of the field that names the caller, at most 255 characters; empty where it is missing.
        api_key: as logged; empty where there is none or it is longer than a key can be.
    """

    at_us: int
    ip: str
    method: str
    path: str
    subject: str
    api_key: str


Parse: TypeAlias = Callable[[str], Request]

_QUOTED: Final = r"[^\"\\]*(?:\\.[^\"\\]*)*"
# Nearly every line, without a backslash or a second space anywhere that matters: in one go, with nothing to try twice.
_PLAIN: Final = re.compile(
    r'([^ ]{1,255}) [^ ]+ ([^ \[]{1,255}) \[([^\]]{26})\] "([A-Z]{1,32}) ([^ "\\?]*+)[^ "\\]*+ [^ "\\]*+" (?:\d{3}|-) (?:\d++|-)',
    re.ASCII,
)
# Host, user and time up to the request; the user may hold spaces, so it ends where " [" begins.
_ANY: Final = re.compile(
    rf'([^ ]{{1,255}}) [^ ]+ ([^\[]{{1,255}}?) \[([^\]]{{20,40}})\] "({_QUOTED})" (?:\d{{3}}|-) (?:\d+|-)', re.ASCII
)
_TAIL: Final = re.compile(rf' "({_QUOTED})" "({_QUOTED})"')
_METHOD: Final = re.compile(r"[A-Z][A-Z_-]{0,31}", re.ASCII)
_ESCAPED: Final = re.compile(r"(\\(?:x[0-9A-Fa-f]{2}|.))", re.DOTALL)
_HEX: Final = "0123456789ABCDEFabcdef"


class _Unescaped(dict[str, str]):
    r"""What a server wrote as `\xNN`, `\"`, `\\` or `\n`, by its escape; bytes beyond ASCII are percent-encoded.

    All that is common is in the table, because what is not costs a call.
    """

    def __init__(self) -> None:
        super().__init__({f"\\{chr(code)}": chr(code) for code in range(128)})
        self |= {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\b": "\b", r"\f": "\f", r"\v": "\v"}
        for digits in _BYTES:
            byte = int(digits, 16)
            self[rf"\x{digits}"] = chr(byte) if byte < 0x80 else f"%{byte:02X}"

    def __missing__(self, escape: str) -> str:
        return escape[1:]


class _ForJson(dict[str, str]):
    r"""`\xNN`, which JSON has not, as `\u00NN`; every other escape stays."""

    def __init__(self) -> None:
        super().__init__({f"\\{chr(code)}": f"\\{chr(code)}" for code in range(128)})
        self |= {rf"\x{digits}": rf"\u00{digits}" for digits in _BYTES}

    def __missing__(self, escape: str) -> str:
        return escape


_BYTES: Final = [first + second for first in _HEX for second in _HEX]
_UNESCAPED: Final = _Unescaped()
_FOR_JSON: Final = _ForJson()
_new: Final = tuple.__new__


def parser_of(
    name: str, subject: str, key_field: str | None, fields: Mapping[str, str] | None = None, header: Sequence[str] = ()
) -> Parse:
    """The parser of a format.

    Args:
        name: combined, common, json or csv.
        subject: ip, user, or the name of a field.
        key_field: field with the API key, None for the usual ones.
        fields: for json and csv: other names for keys of `FIELDS`.
        header: for csv: the names of its columns.

    Returns:
        A function from a line to its request that raises `Malformed`.

    Raises:
        SettingsError: if the log has no such field.
    """
    if name in ("combined", "common"):
        return _combined(subject.lower(), key_field.lower() if key_field else None)
    names = dict(FIELDS) | {role: (field,) for role, field in (fields or {}).items()}
    if key_field:
        names["key"] = (key_field,)
    names["subject"] = names.get(subject.lower(), (subject,))
    if name == "json":
        read = _record_reader(names)
        return lambda line: read(_json_record(line))
    columns = [column.strip().lower() for column in header]
    names = {role: tuple(each.lower() for each in several) for role, several in names.items()}
    for wanted in (*(names[role] for role in fields or {}), names["subject"], *((names["key"],) if key_field else ())):
        if not set(wanted) & set(columns):
            raise SettingsError(
                f"the log has no column {_listed(wanted)}: there are {', '.join(columns)[:500]}: "
                "name the one meant with --subject, --field or --key-field"
            )
    read_row = _record_reader(names)
    return lambda line: read_row(_csv_record(line, columns))


def detect(line: str) -> str | None:
    """Tell a log's format by one of its lines.

    Args:
        line: the line.

    Returns:
        combined, common, json, csv (the line is the header then), or None where the line tells nothing.
    """
    text = line.strip()
    if text.startswith("{"):
        try:
            _json_record(text)
        except Malformed:
            return None
        return "json"
    if found := _ANY.match(text):
        return "combined" if _TAIL.match(text, found.end()) else "common"
    columns = {column.lower() for column in csv_columns(text)}
    if columns & set(FIELDS["time"]) and columns & {*FIELDS["path"], *FIELDS["request"]}:
        return "csv"
    return None


def csv_columns(line: str) -> list[str]:
    """The columns of a CSV line.

    Args:
        line: the line.

    Returns:
        Their texts; none where it is not CSV.
    """
    try:
        return [column.strip() for column in next(csv.reader([line.strip()], strict=True), [])]
    except csv.Error:
        return []


def _combined(subject: str, key_field: str | None) -> Parse:
    for field in (subject, *((key_field,) if key_field else ())):
        if field not in COMBINED_FIELDS:
            raise SettingsError(f"a common or combined log has no field {field!r}: there are {', '.join(COMBINED_FIELDS)}")
    moment_of = ApacheTimes()
    plain = _PLAIN.match
    by_ip = subject == "ip"
    only_own = subject in ("ip", "user") and key_field is None

    def parse(line: str) -> Request:
        found = plain(line)
        if found is not None:
            ip, user, time_text, method, path = found.groups()
        else:
            found = _ANY.match(line)
            if found is None:
                raise Malformed("not a line of a common or combined log")
            ip, user, time_text, request = found.groups()
            method, path = _request(request)
        if len(path) > MAX_PATH_BYTES:
            path = path[: MAX_PATH_BYTES + 1]
        at_us = moment_of(time_text)
        if only_own:
            named, key = ip if by_ip else user, ""
        else:
            tail = _TAIL.match(line, found.end())
            values = {"ip": ip, "user": user, "referer": tail[1] if tail else "", "agent": tail[2] if tail else ""}
            named, key = _name(values[subject]), _key(values[key_field]) if key_field else ""
        # A named tuple's own constructor costs five times this.
        return _new(Request, (at_us, ip, method, path, "" if named == "-" else named, key))

    return parse


def _record_reader(names: Mapping[str, tuple[str, ...]]) -> Callable[[Mapping[str, Any]], Request]:
    times, ips, methods, paths = names["time"], names["ip"], names["method"], names["path"]
    requests, subjects, keys = names["request"], names["subject"], names["key"]

    def read(record: Mapping[str, Any]) -> Request:
        time_value = _first(record, times)
        if time_value is None:
            raise Malformed("no field with a time: " + _listed(times))
        path = _first(record, paths)
        if path is None:
            request = _first(record, requests)
            if not isinstance(request, str):
                raise Malformed("no field with a path: " + _listed((*paths, *requests)))
            method, path = _request(request)
        else:
            method = str(_first(record, methods) or "GET").upper()
            if not isinstance(path, str) or not _METHOD.fullmatch(method):
                raise Malformed(f"no HTTP request in {method[:40]!r} {str(path)[:60]!r}")
            path = path.partition("?")[0][: MAX_PATH_BYTES + 1]
        ip, subject, key = _name(_first(record, ips)), _name(_first(record, subjects)), _key(_first(record, keys))
        if not (ip or subject or key):
            raise Malformed("no field that names the caller: " + _listed(dict.fromkeys((*subjects, *ips))))
        return _new(Request, (moment_us(time_value), ip, method, path, subject, key))

    return read


def _request(request: str) -> tuple[str, str]:
    """Method and path of a request line as it stands in a log."""
    parts = request.split(" ")
    if len(parts) not in (2, 3) or not _METHOD.fullmatch(parts[0]):
        raise Malformed(f"no HTTP request in {request[:60]!r}")
    path = parts[1].partition("?")[0]
    if "\\" in path:
        # An escape has at most 4 characters and stands for at least one.
        path = _replace_escapes(path[: 4 * (MAX_PATH_BYTES + 1)], _UNESCAPED)
    return parts[0], path[: MAX_PATH_BYTES + 1]


def _replace_escapes(text: str, replacements: Mapping[str, str]) -> str:
    """Replace escapes without a call in Python for each of those that are known."""
    pieces = _ESCAPED.split(text)
    pieces[1::2] = map(replacements.__getitem__, pieces[1::2])
    return "".join(pieces)


def _json_record(line: str) -> Mapping[str, Any]:
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        # nginx without escape=json writes \xNN, which JSON has not; bytes that are no UTF-8 were read so too.
        if "\\x" in line:
            mended = _replace_escapes(line, _FOR_JSON)
            if mended != line:
                return _json_record(mended)
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


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        value = record.get(name)
        if value is not None and value != "":
            return value
    return None


def _listed(names: Iterable[str]) -> str:
    return " or ".join(names)


def _name(value: object) -> str:
    if value is None or value == "-":
        return ""
    if not isinstance(value, str | int | float):
        raise Malformed("the caller's name must be text or a number")
    text = str(value)
    if len(text) > MAX_NAME:
        raise Malformed(f"the caller's name has more than {MAX_NAME} characters")
    return text


def _key(value: object) -> str:
    return value if isinstance(value, str) and value != "-" and len(value) <= _MAX_KEY else ""
