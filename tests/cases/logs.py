"""Log lines as data: what each says, and what is wrong with the ones that say nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

T0 = 1_700_000_000
"""2023-11-14 22:13:20 UTC, in unix seconds."""


class Line(NamedTuple):
    """One line, and the request it stands for."""

    title: str
    log_format: str
    line: str
    at_us: int
    ip: str
    method: str
    path: str
    subject: str
    api_key: str = ""
    options: dict[str, Any] = {}  # noqa: RUF012 - a default that nobody changes
    header: str = ""


AT = T0 * 1_000_000
COMBINED = '10.0.0.1 - - [14/Nov/2023:22:13:20 +0000] "GET /a/b HTTP/1.1" 200 12 "http://from/" "Agent/1.0 (x; y)"'
COMMON = '10.0.0.1 - ann [14/Nov/2023:22:13:20 +0000] "POST /a HTTP/1.0" 404 -'
CSV_HEADER = "time,ip,user,method,path,api_key"

LINES = [
    Line("combined", "combined", COMBINED, AT, "10.0.0.1", "GET", "/a/b", "10.0.0.1"),
    Line("common", "common", COMMON, AT, "10.0.0.1", "POST", "/a", "10.0.0.1"),
    Line("by user", "common", COMMON, AT, "10.0.0.1", "POST", "/a", "ann", options={"subject": "user"}),
    Line("no user", "combined", COMBINED, AT, "10.0.0.1", "GET", "/a/b", "", options={"subject": "user"}),
    Line("by referer", "combined", COMBINED, AT, "10.0.0.1", "GET", "/a/b", "http://from/", options={"subject": "referer"}),
    Line(
        "key in agent",
        "combined",
        COMBINED,
        AT,
        "10.0.0.1",
        "GET",
        "/a/b",
        "10.0.0.1",
        "Agent/1.0 (x; y)",
        {"key_field": "agent"},
    ),
    Line(
        "user with spaces",
        "common",
        COMMON.replace("ann", "ann lee"),
        AT,
        "10.0.0.1",
        "POST",
        "/a",
        "ann lee",
        options={"subject": "user"},
    ),
    Line("offset", "common", COMMON.replace("22:13:20 +0000", "23:43:20 +0130"), AT, "10.0.0.1", "POST", "/a", "10.0.0.1"),
    Line("west", "common", COMMON.replace("22:13:20 +0000", "14:13:20 -0800"), AT, "10.0.0.1", "POST", "/a", "10.0.0.1"),
    Line("query", "common", COMMON.replace("/a ", "/a?b=c?d "), AT, "10.0.0.1", "POST", "/a", "10.0.0.1"),
    Line("escaped quote", "common", COMMON.replace("/a ", r"/a\"b "), AT, "10.0.0.1", "POST", '/a"b', "10.0.0.1"),
    Line("escaped bytes", "common", COMMON.replace("/a ", r"/\xc3\xa9\x22 "), AT, "10.0.0.1", "POST", '/%C3%A9"', "10.0.0.1"),
    Line("escaped newline", "common", COMMON.replace("/a ", r"/a\n\\ "), AT, "10.0.0.1", "POST", "/a\n\\", "10.0.0.1"),
    Line("escape in query", "common", COMMON.replace("/a ", r"/a?q=\x22 "), AT, "10.0.0.1", "POST", "/a", "10.0.0.1"),
    Line("HTTP/0.9", "common", COMMON.replace(" HTTP/1.0", ""), AT, "10.0.0.1", "POST", "/a", "10.0.0.1"),
    Line("M-SEARCH", "common", COMMON.replace("POST", "M-SEARCH"), AT, "10.0.0.1", "M-SEARCH", "/a", "10.0.0.1"),
    Line("IPv6", "common", COMMON.replace("10.0.0.1", "2001:db8::1"), AT, "2001:db8::1", "POST", "/a", "2001:db8::1"),
    Line("host name", "common", COMMON.replace("10.0.0.1", "host.example"), AT, "host.example", "POST", "/a", "host.example"),
    Line("leap second", "common", COMMON.replace("22:13:20", "22:13:60"), AT + 40_000_000, "10.0.0.1", "POST", "/a", "10.0.0.1"),
    Line(
        "nginx json",
        "json",
        '{"time_iso8601":"2023-11-14T23:13:20+01:00","remote_addr":"10.0.0.1","request_method":"get","request_uri":"/a?b"}',
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
    ),
    Line(
        "json msec",
        "json",
        '{"msec":"1700000000.123","ip":"10.0.0.1","request":"PUT /a HTTP/2.0"}',
        AT + 123_000,
        "10.0.0.1",
        "PUT",
        "/a",
        "10.0.0.1",
    ),
    Line(
        "json ms",
        "json",
        '{"ts":1700000000123,"client_ip":"10.0.0.1","uri":"/a"}',
        AT + 123_000,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
    ),
    Line(
        "json µs", "json", '{"ts":1700000000123456,"ip":"10.0.0.1","uri":"/a"}', AT + 123_456, "10.0.0.1", "GET", "/a", "10.0.0.1"
    ),
    Line(
        "json ns",
        "json",
        '{"ts":1700000000123456000,"ip":"10.0.0.1","uri":"/a"}',
        AT + 123_456,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
    ),
    Line(
        "json no offset",
        "json",
        '{"@timestamp":"2023-11-14T22:13:20","ip":"10.0.0.1","path":"/a"}',
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
    ),
    Line(
        "json Z",
        "json",
        '{"@timestamp":"2023-11-14T22:13:20Z","ip":"10.0.0.1","path":"/a"}',
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
    ),
    Line(
        "json apache time",
        "json",
        '{"time_local":"14/Nov/2023:22:13:20 +0000","ip":"10.0.0.1","path":"/a"}',
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
    ),
    Line(
        "json key",
        "json",
        '{"time":1700000000,"ip":"10.0.0.1","path":"/a","http_x_api_key":"demo-free-key-0001"}',
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
        "demo-free-key-0001",
    ),
    Line(
        "json own field",
        "json",
        '{"time":1700000000,"ip":"10.0.0.1","path":"/a","tenantId":77}',
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "77",
        options={"subject": "tenantId"},
    ),
    Line(
        "json renamed",
        "json",
        '{"start":1700000000,"cfIp":"10.0.0.1","ip":"1.1.1.1","p":"/a"}',
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
        options={"fields": {"time": "start", "ip": "cfIp", "path": "p"}},
    ),
    Line(
        "json no ip",
        "json",
        '{"time":1700000000,"path":"/a","user":"ann"}',
        AT,
        "",
        "GET",
        "/a",
        "ann",
        options={"subject": "user"},
    ),
    Line(
        "json by nginx's own escapes",
        "json",
        r'{"time":1700000000,"ip":"10.0.0.1","path":"/a","agent":"\xff\x22"}',
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
    ),
    Line(
        "csv",
        "csv",
        "2023-11-14T22:13:20Z,10.0.0.1,ann,GET,/a?x,k",
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
        "k",
        header=CSV_HEADER,
    ),
    Line(
        "csv quotes",
        "csv",
        '1700000000,10.0.0.1,"lee, ann ""al""",GET,"/a,b",',
        AT,
        "10.0.0.1",
        "GET",
        "/a,b",
        'lee, ann "al"',
        options={"subject": "user"},
        header=CSV_HEADER,
    ),
    Line(
        "csv header in quotes",
        "csv",
        "1700000000,10.0.0.1,/a",
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "10.0.0.1",
        header='"Time","Remote_Addr","Path"',
    ),
    Line(
        "csv own column",
        "csv",
        "1700000000,10.0.0.1,/a,acme",
        AT,
        "10.0.0.1",
        "GET",
        "/a",
        "acme",
        options={"subject": "Tenant"},
        header="time,ip,path,TENANT",
    ),
]

# format, line, words of the reason
MALFORMED = [
    ("combined", "", "not a line"),
    ("combined", "hello", "not a line"),
    ("combined", COMBINED.replace("/Nov/", "/Nox/"), "not understood"),
    ("combined", COMBINED.replace("14/Nov", "31/Nov"), "no moment"),
    ("combined", COMBINED.replace(":20 +", ":61 +"), "not understood"),
    ("combined", COMBINED.replace(":20 +", ":+5 +"), "not understood"),
    ("combined", COMBINED.replace("14/Nov/2023", "14/Nov/1923"), "1970"),
    ("combined", COMBINED.replace("14/Nov/2023", "31/Dec/9999"), "9999"),
    ("combined", COMBINED.replace("GET /a/b HTTP/1.1", "-"), "no HTTP request"),
    ("combined", COMBINED.replace("GET /a/b HTTP/1.1", r"\x16\x03\x01"), "no HTTP request"),
    ("combined", COMBINED.replace("/a/b", "/a b c"), "no HTTP request"),
    ("combined", COMBINED.replace("10.0.0.1", "x" * 256), "not a line"),
    ("json", "[1,2]", "object"),
    ("json", '{"time":1', "not JSON"),
    ("json", "[" * 20_000, "not JSON"),
    ("json", '{"ip":"10.0.0.1","path":"/a"}', "no field with a time"),
    ("json", '{"time":1700000000,"ip":"10.0.0.1"}', "no field with a path"),
    ("json", '{"time":1700000000,"path":"/a"}', "names the caller"),
    ("json", '{"time":1700000000,"ip":["10.0.0.1"],"path":"/a"}', "text or a number"),
    ("json", '{"time":1700000000,"ip":"10.0.0.1","path":7}', "no HTTP request"),
    ("json", '{"time":1700000000,"ip":"10.0.0.1","path":"/a","method":"G T"}', "no HTTP request"),
    ("json", '{"time":true,"ip":"10.0.0.1","path":"/a"}', "not understood"),
    ("json", '{"time":"soon","ip":"10.0.0.1","path":"/a"}', "not understood"),
    ("json", '{"time":-5,"ip":"10.0.0.1","path":"/a"}', "1970"),
    ("json", '{"time":1e300,"ip":"10.0.0.1","path":"/a"}', "9999"),
    ("json", '{"time":9' + "0" * 60 + ',"ip":"10.0.0.1","path":"/a"}', "9999"),
    ("json", '{"time":"9999-12-31T23:59:59Z","ip":"10.0.0.1","path":"/a"}', "9999"),
    ("json", '{"time":"0001-01-01T00:00:00+14:00","ip":"10.0.0.1","path":"/a"}', "1970"),
    ("json", '{"time":1700000000,"ip":"' + "x" * 256 + '","path":"/a"}', "255 characters"),
    ("csv", "1700000000,10.0.0.1", "columns"),
    ("csv", '1700000000,10.0.0.1,ann,GET,"/a,k', "not CSV"),
    ("csv", ",10.0.0.1,ann,GET,/a,k", "no field with a time"),
]
