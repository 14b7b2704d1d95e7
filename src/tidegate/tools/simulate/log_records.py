"""Lines that are records with named fields: JSON, CSV with a header, W3C extended logs (IIS, CloudFront)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import msgspec

from tidegate.errors import SettingsError
from tidegate.tools.simulate.log_clients import Clients
from tidegate.tools.simulate.log_durations import UNKNOWN, Durations, duration_of
from tidegate.tools.simulate.log_request import (
    FOR_JSON,
    MAX_NAME,
    METHOD,
    Directive,
    NoAddress,
    Request,
    cost_of,
    key_of,
    name_of,
    path_of,
    replace_escapes,
    request_of_line,
)
from tidegate.tools.simulate.log_times import Malformed, timestamp_us

FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "time": (
        *("time_iso8601", "@timestamp", "timestamp", "time", "msec", "ts", "time_local", "datetime", "date"),
        *("start_time", "StartUTC", "requestTime"),
    ),
    "ip": (
        *("remote_addr", "client_ip", "ip", "remote_ip", "clientip"),
        *("request.client_ip", "request.remote_ip", "ClientHost", "ClientAddr", "httpRequest.remoteIp", "client.ip", "source.ip"),
        *("downstream_remote_address", "c-ip", "x_forwarded_for", "x-forwarded-for", "host"),
    ),
    "user": ("remote_user", "user", "username", "user_id", "ClientUsername", "user.name", "cs-username"),
    "method": (
        *("request_method", "method", "verb", "request.method", "RequestMethod", "httpRequest.requestMethod"),
        *("http.request.method", "httpMethod", "cs-method"),
    ),
    "path": (
        *("request_uri", "uri", "path", "url", "target", "request.uri", "RequestPath", "httpRequest.requestUrl"),
        *("url.original", "url.path", "x_envoy_original_path", "cs-uri-stem"),
    ),
    "request": ("request", "request_line"),
    "key": ("http_x_api_key", "x_api_key", "api_key", "request.headers.x-api-key"),
}
"""Default field names of JSON, CSV and W3C logs; case-insensitive, `a.b` for b inside a."""
CALLER_FIELDS: Final = ("tidegate_key_id", "tidegate_customer", "tidegate_tier")
"""Fields with what Tidegate named to the gateway that logged the request: `Request.named`."""
INNER_FIELDS: Final = ("log", "message", "msg")
"""Fields in which Docker, Fluent Bit and journald store the line that a server wrote."""

_MAX_SHAPES: Final = 1000
_Places: TypeAlias = tuple[tuple[str, ...], ...]


class RecordReader:
    """Parses records into requests. The position of each value is determined once per set of field names.

    Args:
        names: field names for each key of `FIELDS` and for `subject`, in order of preference.
        clients: parses the client address.
        inner: parses the text field of a record without a path.
        attributes: the field of each attribute.
        cost_field: the field of the cost; None if each request costs 1.
        durations: where the duration of a request is; None if it is not needed.
    """

    def __init__(
        self,
        names: Mapping[str, tuple[str, ...]],
        clients: Clients,
        inner: Callable[[str], Request] | None = None,
        attributes: Sequence[str] = (),
        cost_field: str | None = None,
        durations: Durations | None = None,
    ) -> None:
        self._durations = durations
        self._costs = cost_field is not None
        # No role has a digit in its name.
        self._attributes = tuple(str(number) for number in range(len(attributes)))
        fields: dict[str, tuple[str, ...]] = {role: (field,) for role, field in zip(self._attributes, attributes, strict=True)}
        fields["cost"] = () if cost_field is None else (cost_field,)
        fields["duration"] = () if durations is None else (durations.field,)
        self._names = {**names, **fields, **{name: (name,) for name in CALLER_FIELDS}, "inner": INNER_FIELDS}
        self._clients = clients
        self._inner = inner
        self._shapes: dict[tuple[str, ...], dict[str, _Places]] = {}

    def __call__(self, record: Mapping[str, Any]) -> Request:
        """The request of a record (field names → values).

        Raises:
            Malformed: if it does not contain a request.
        """
        shape = tuple(record)
        places = self._shapes.get(shape)
        if places is None:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            places = self._shapes[shape] = self._locate(shape)
        path = _first(record, places["path"])
        request = _first(record, places["request"]) if path is None else None
        if path is None and not isinstance(request, str):
            text = _first(record, places["inner"])
            if self._inner is not None and isinstance(text, str):
                return self._inner(text)
        time_value = _first(record, places["time"])
        if time_value is None:
            raise Malformed("no field with a time: " + self._listed("time"))
        if path is None:
            if not isinstance(request, str):
                raise Malformed("no field with a path: " + self._listed("path", "request"))
            method, path = request_of_line(request)
        else:
            method = str(_first(record, places["method"]) or "GET").upper()
            if not isinstance(path, str) or not METHOD.fullmatch(method):
                raise Malformed(f"no HTTP request in {method[:40]!r} {str(path)[:60]!r}")
            path = path_of(path)
        ip, logged = self._client(record, places["ip"])
        subject = ip if self._names["subject"] == self._names["ip"] else name_of(_first(record, places["subject"]))
        key = key_of(_first(record, places["key"]))
        attributes = tuple([name_of(_first(record, places[role])) for role in self._attributes]) if self._attributes else ()
        named: tuple[str, ...] = ()
        if places["tidegate_tier"] or places["tidegate_key_id"] or places["tidegate_customer"]:
            named = tuple([name_of(_first(record, places[field])) for field in CALLER_FIELDS])
        if not (ip or subject or key or any(attributes) or any(named)):
            if logged:
                raise NoAddress(logged)
            raise Malformed("no field that identifies the caller: " + self._listed("subject", "ip"))
        cost = cost_of(_first(record, places["cost"])) if self._costs else 1
        found: Request = tuple.__new__(
            Request, (timestamp_us(time_value), ip, method, path, subject, key, attributes, named, cost, UNKNOWN)
        )
        if self._durations is None:
            return found
        duration_us = duration_of(_first(record, places["duration"]), self._durations.unit)
        return found.lasting(duration_us, self._durations.is_end(places["time"][0][-1]))

    def _client(self, record: Mapping[str, Any], places: _Places) -> tuple[str, str]:
        """The first address among the client fields, and the logged text if none of them is an address."""
        logged = ""
        for place in places:
            value = _value(record, place)
            if type(value) is not str:
                if isinstance(value, dict) and len(places) > 1:
                    continue
                value = name_of(value)
            text = "" if value == "-" else value if len(value) <= MAX_NAME else name_of(value)
            if text:
                ip = self._clients(text)
                if ip:
                    return ip, text
                logged = logged or text
        return "", logged

    def _locate(self, shape: Sequence[str]) -> dict[str, _Places]:
        spelled: dict[str, str] = {}
        for name in shape:
            spelled.setdefault(name.lower(), name)
        located: dict[str, _Places] = {}
        for role, names in self._names.items():
            places: list[tuple[str, ...]] = []
            for name in names:
                exact = name if name in shape else spelled.get(name.lower())
                if exact is not None:
                    places.append((exact,))
                    continue
                first, *rest = name.split(".")
                outer = spelled.get(first.lower())
                if rest and outer is not None:
                    places.append((outer, *rest))
            located[role] = tuple(places)
        return located

    def _listed(self, *roles: str) -> str:
        return " or ".join(list(dict.fromkeys(name for role in roles for name in self._names[role]))[:12])


def json_record(line: str) -> Mapping[str, Any]:
    r"""The object of a JSON line, also of one with `\xNN` as nginx writes it without `escape=json`.

    Raises:
        Malformed: if it is not a JSON object.
    """
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        # nginx without escape=json writes \xNN, which is not JSON; bytes that are not UTF-8 were decoded like this too.
        if "\\x" in line:
            unescaped = replace_escapes(line, FOR_JSON)
            if unescaped != line:
                return json_record(unescaped)
        raise Malformed(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise Malformed("a JSON line must be an object")
    return record


def csv_columns(line: str) -> list[str]:
    """The columns of a CSV line; empty if it is not CSV."""
    try:
        return [column.strip() for column in next(csv.reader([line.strip()], strict=True), [])]
    except csv.Error:
        return []


def csv_record(line: str, columns: Sequence[str]) -> Mapping[str, Any]:
    """The record of a CSV line: column names → texts.

    Raises:
        Malformed: if the number of columns differs.
    """
    try:
        values = next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise Malformed(f"not CSV: {error}") from None
    return _row(values, columns)


class W3cRecords:
    """Parses lines of a W3C extended log into records. `#Fields:` may be repeated with other fields, as by IIS after a restart.

    Args:
        check: called with the field names of each `#Fields:` line; may raise `SettingsError`.
    """

    def __init__(self, check: Callable[[Sequence[str]], None]) -> None:
        self._check = check
        self._fields: list[str] = []
        self._date = ""

    def __call__(self, line: str) -> Mapping[str, Any]:
        """The record of a line: names in lower case → texts; `date` and `time` are combined as `datetime`.

        Raises:
            Directive: if the line is a directive.
            Malformed: if it does not have the fields.
        """
        line = line.strip("\r\n")
        if line.startswith("#"):
            name, _, value = line.partition(":")
            if name.lower() == "#fields":
                self._fields = value.lower().split()
                self._check(self._fields)
            elif name.lower() == "#date":
                self._date = value.strip().partition(" ")[0]
            raise Directive
        if not self._fields:
            raise Malformed("before the first #Fields line")
        # CloudFront separates by tabs, IIS by single spaces; neither separator occurs in the fields of the other.
        record = dict(_row(line.split("\t") if "\t" in line else line.split(), self._fields))
        if "time" in record:
            record["datetime"] = f"{record.get('date') or self._date}T{record.pop('time')}"
        record.pop("date", None)
        return {name: value for name, value in record.items() if value != "-"}


def require_columns(columns: Sequence[str], required: Iterable[tuple[str, ...]]) -> None:
    """Require columns that were given by name.

    Args:
        columns: columns of the log, in lower case.
        required: accepted names of each required column.

    Raises:
        SettingsError: if a column is missing.
    """
    for names in required:
        if not {name.lower() for name in names} & set(columns):
            raise SettingsError(
                f"the log has no column {' or '.join(names[:12])}; its columns are {', '.join(columns)[:500]}: "
                "select one with --subject, --field or --key-field"
            )


def _row(values: Sequence[str], columns: Sequence[str]) -> Mapping[str, Any]:
    if len(values) != len(columns):
        raise Malformed(f"{len(values)} columns, but the header has {len(columns)}")
    return dict(zip(columns, values, strict=True))


def _first(record: Mapping[str, Any], places: _Places) -> Any:
    for place in places:
        value = _value(record, place)
        # An object does not count as a value if there are several candidates: ECS has `url.original`, others have `url`.
        if value is not None and value != "" and (len(places) == 1 or not isinstance(value, dict)):
            return value
    return None


def _value(record: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    value: Any = record.get(place[0])
    if type(value) is str and len(place) == 1:
        return value  # the common case
    for part in place[1:]:
        if not isinstance(value, dict):
            return None
        inner = value.get(part)
        if inner is None:
            inner = next((each for name, each in value.items() if name.lower() == part.lower()), None)
        value = inner
    # In Caddy's logs headers are lists of strings.
    return ", ".join(value) if isinstance(value, list) and value and all(isinstance(each, str) for each in value) else value
