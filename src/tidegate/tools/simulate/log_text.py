"""Text formats: common, combined, Envoy, HAProxy, AWS load balancers.

A format is detected by its pattern. Lines of the common and combined formats may have additions: the virtual host before the
client (Debian's `vhost_combined`), the prefixes of syslog, Kubernetes (CRI) and docker compose, and quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from tidegate.errors import SettingsError
from tidegate.policy.paths import MAX_PATH_BYTES
from tidegate.tools.simulate.log_clients import Clients, address_of
from tidegate.tools.simulate.log_durations import OF_TEXT, UNKNOWN, Durations
from tidegate.tools.simulate.log_request import NoAddress, Parse, Request, key_of, name_of, request_of_line
from tidegate.tools.simulate.log_times import ApacheTimes, Malformed, timestamp_us

COMBINED_FIELDS: Final = ("ip", "user", "referer", "agent")
OTHER_FIELDS: Final = ("ip", "agent")

_QUOTED: Final = r"[^\"\\]*(?:\\.[^\"\\]*)*"
# Most lines: no backslash and no second space in the relevant fields. The pattern matches without backtracking.
_PLAIN: Final = re.compile(
    r"([^ ]{1,255}) [^ ]+ ([^ \[]{1,255}) \[([^\]]{26})\] "
    r'"([A-Z]{1,32}) (/[^ "\\?]*+)[^ "\\]*+ [^ "\\]*+" (?:\d{3}|-) (?:\d++|-)',
    re.ASCII,
)
# From the time on; before it are the client, the user, and additions of servers and log shippers.
_CORE: Final = re.compile(rf'\[([^\]"]{{10,40}})\] "({_QUOTED})" (?:\d{{3}}|-) (?:\d+|-)', re.ASCII)
_TAIL: Final = re.compile(rf' "({_QUOTED})" "({_QUOTED})"')
_PREFIX: Final = re.compile(
    r"(?:"
    r"\d{4}-\d\d-\d\dT\S{8,30} std(?:out|err) [FP] "  # Kubernetes (CRI)
    r"|<\d{1,3}>1 \S{1,64} \S{1,255} \S{1,48} \S{1,128} \S{1,32} (?:-|\[[^\]]{0,1000}\]) "  # syslog, RFC 5424
    r"|(?:<\d{1,3}>)?[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \S{1,255} [^\s:]{1,64}: "  # syslog, RFC 3164
    r"|\d{4}-\d\d-\d\d[T ]\S{8,30} \S{1,255} [^\s:]{1,64}: "  # rsyslog, journalctl -o short-iso
    r"|[A-Za-z0-9._-]{1,128} +\| "  # docker compose logs
    r")",
    re.ASCII,
)
# Envoy does not escape, so a User-Agent may contain quotes: fields are matched from both ends. After the flags Istio has two more
# words and a quoted text; then follow bytes and times, X-Forwarded-For, User-Agent, X-Request-Id, authority, upstream.
_ENVOY: Final = re.compile(
    r'\[(\d{4}-\d\d-\d\dT[\d:.]{8,20}Z)\] "([^" ]{1,32}) ([^" ]*)[^"]*" (?:\d{1,3}|-) [^ "]{1,64} '
    r'(?:[^ "]{1,255} [^ "]{1,255} "[^"]*" )?(?:\d+|-) (?:\d+|-) (\d+|-) (?:\d+|-) "([^"]*)" "([^"]*)',
    re.ASCII,
)
_HAPROXY: Final = re.compile(
    r"(?:haproxy\[\d+\]: )?(\S{2,64}:\d{1,5}) \[(\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d\.\d{3})\] "
    r"\S+ \S+ ([-+\d/]{5,80}) -?\d{1,3} \+?\d+ ",
    re.ASCII,
)
_ALB: Final = re.compile(
    r"(?:(?:https?|h2|grpcs|wss?) )?(\d{4}-\d\d-\d\dT[\d:.]{8,20}Z) \S{1,255} (\S{1,64}) \S{1,64} ((?:[-\d.]{1,20} ){7})"
    rf'"({_QUOTED})"(?: "({_QUOTED})")?',
    re.ASCII,
)
_new: Final = tuple.__new__


class LogFields(NamedTuple):
    """Fields of a line, before the client is parsed: texts as logged, `-` if missing."""

    at_us: int
    client: str
    method: str
    path: str
    user: str = "-"
    referer: str = "-"
    agent: str = "-"
    taken: str = "-"
    """How long it took, as in the format."""


def bare_line(line: str) -> str:
    """The line as the server wrote it: without a syslog, Kubernetes or docker compose prefix, and without enclosing quotes."""
    text = line.strip()
    if found := _PREFIX.match(text):
        text = text[found.end() :]
    if len(text) > 2 and text[0] == text[-1] == '"':
        try:
            inner = json.loads(text)
            return inner.strip() if isinstance(inner, str) else text
        except (ValueError, RecursionError):
            if '""' in text:  # quoted as in CSV
                return text[1:-1].replace('""', '"').strip()
    return text


def text_format(text: str) -> str | None:
    """The format of a bare line: envoy, haproxy, alb, combined, common, or None."""
    for name, shape in (("envoy", _ENVOY), ("haproxy", _HAPROXY), ("alb", _ALB)):
        if shape.match(text):
            return name
    if found := _CORE.search(text):
        return "combined" if _TAIL.match(text, found.end()) else "common"
    return None


def text_parser(
    name: str,
    subject: str,
    key_field: str | None,
    clients: Clients,
    attributes: Sequence[str] = (),
    durations: Durations | None = None,
) -> Parse:
    """The parser of a text format.

    Args:
        name: common, combined, envoy, haproxy or alb.
        subject: ip, or the name of a field of that format.
        key_field: field with the API key, or None.
        clients: parses the client address.
        attributes: the field of each attribute.
        durations: where the duration of a request is; None if it is not needed.

    Returns:
        A function from a line to its request; it raises `Malformed`.

    Raises:
        SettingsError: if the format has no such field.
    """
    is_clf = name in ("combined", "common")
    fields = COMBINED_FIELDS if is_clf else OTHER_FIELDS
    for field in (subject, *((key_field,) if key_field else ()), *attributes):
        if field not in fields:
            raise SettingsError(f"a log in the format {name} has no field {field!r}; its fields are {', '.join(fields)}")
    if durations is not None and (name not in OF_TEXT or durations.field.lower() != "duration"):
        raise SettingsError(
            f"a log in the format {name} has no field {durations.field!r} with the duration of a request: give a JSON, CSV or "
            f"W3C log that has one, or --duration-field duration for the formats {', '.join(OF_TEXT)}"
        )
    find = _reader(subject, key_field, clients, _READERS[name], attributes)
    if durations is not None:
        return _with_duration(find, name, durations)
    is_plain = is_clf and subject in ("ip", "user") and not key_field and not attributes
    return _with_fast_path(find, subject == "ip", clients) if is_plain else find


def _with_fast_path(slow: Parse, by_ip: bool, clients: Clients) -> Parse:
    """A faster parser for common and combined logs if only the client or the user is needed."""
    moment_of = ApacheTimes()
    plain = _PLAIN.match

    def parse(line: str) -> Request:
        found = plain(line)
        if found is None:
            return slow(line)
        client, user, time_text, method, path = found.groups()
        ip = clients(client)
        if not ip:
            return slow(line)  # a virtual host, the start of a chain, or not an address
        if len(path) > MAX_PATH_BYTES:
            path = path[: MAX_PATH_BYTES + 1]
        # A named tuple's own constructor takes five times as long.
        return _new(
            Request,
            (moment_of(time_text), ip, method, path, ip if by_ip else "" if user == "-" else user, "", (), (), 1, UNKNOWN),
        )

    return parse


def _reader(
    subject: str, key_field: str | None, clients: Clients, read: Callable[[str], LogFields], attributes: Sequence[str] = ()
) -> Parse:
    def parse(line: str) -> Request:
        found = read(bare_line(line))
        ip = clients(found.client)
        values: Mapping[str, str] = {"ip": ip, "user": found.user, "referer": found.referer, "agent": found.agent}
        named = name_of(values[subject])
        key = key_of(values[key_field]) if key_field else ""
        own = tuple(name_of(values[field]) for field in attributes)
        if not (ip or named or key or any(own)):
            raise NoAddress(found.client)
        return _new(Request, (found.at_us, ip, found.method, found.path, named, key, own, (), 1, UNKNOWN))

    return parse


def _with_duration(find: Parse, name: str, durations: Durations) -> Parse:
    read, (duration_of_text, is_end) = _READERS[name], OF_TEXT[name]
    if durations.logged_at:
        is_end = durations.logged_at == "end"

    def parse(line: str) -> Request:
        request = find(line)
        return request.lasting(duration_of_text(read(bare_line(line)).taken), is_end)

    return parse


def _combined(text: str) -> LogFields:
    found = _CORE.search(text)
    if found is None:
        raise Malformed("not a line of a common or combined log")
    client, user = _before_time(text[: found.start()])
    method, path = request_of_line(found[2])
    tail = _TAIL.match(text, found.end())
    referer, agent = (tail[1], tail[2]) if tail else ("-", "-")
    return LogFields(timestamp_us(found[1]), client, method, path, user, referer, agent)


def _before_time(head: str) -> tuple[str, str]:
    """Client and user from the text before the time.

    The first consecutive addresses are the client: one, or a chain of proxies followed by the peer. Text from the client, such as
    a user name that contains an address, follows them and is never used as an address.
    """
    words = head.split()
    start = next((index for index, word in enumerate(words) if _is_chain(word)), None)
    if start is None:
        return (words[-3] if len(words) >= 3 else words[0] if words else "-"), (words[-1] if words else "-")
    end = start + 1
    while end < len(words) and _is_chain(words[end]):
        end += 1
    rest = words[end:]
    return ",".join(word.strip('",') for word in words[start:end]), " ".join(rest[1:] or rest) or "-"


def _is_chain(word: str) -> bool:
    return len(word) <= 4096 and all(address_of(each) for each in word.strip('",').split(","))


def _envoy(text: str) -> LogFields:
    found = _ENVOY.match(text)
    if found is None:
        raise Malformed("not a line of Envoy's default format")
    method, path = request_of_line(f"{found[2]} {found[3]}")
    client = found[5]
    if not text.endswith('"'):
        # Istio appends cluster, addresses of upstream and listener, the client as Envoy derived it from the chain, SNI, route.
        tail = text.rsplit(" ", 6)
        if len(tail) == 7 and tail[0].endswith('"') and address_of(tail[4]):
            client = tail[4]
    return LogFields(timestamp_us(found[1]), client, method, path, agent=found[6], taken=found[4])


def _haproxy(text: str) -> LogFields:
    found = _HAPROXY.match(text)
    start = text.rfind(' "')
    if found is None or start < found.end() - 1:
        raise Malformed("not a line of HAProxy's HTTP format (option httplog)")
    method, path = request_of_line(text[start + 2 :].removesuffix('"'))
    # It has no offset; UTC is assumed, so that the result is the same on every machine.
    return LogFields(timestamp_us(f"{found[2]} +0000"), found[1], method, path, taken=found[3])


def _alb(text: str) -> LogFields:
    found = _ALB.match(text)
    if found is None:
        raise Malformed("not a line of an AWS load balancer")
    method, path = request_of_line(found[4])
    return LogFields(timestamp_us(found[1]), found[2], method, path, agent=found[5] or "-", taken=found[3])


_READERS: Final[Mapping[str, Callable[[str], LogFields]]] = {
    "combined": _combined,
    "common": _combined,
    "envoy": _envoy,
    "haproxy": _haproxy,
    "alb": _alb,
}
