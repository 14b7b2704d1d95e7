"""One table of requests that try to get past a gateway by being read differently by it, by Tidegate and by the API.

Each is sent as bytes, through a gateway that asks Tidegate, to an API. The policy has strict rules of STRICT a minute beside one
of PLAIN for everything else, so that the `X-RateLimit-Limit` of the answer says which rule was asked. What must hold, whichever
gateway it is:

- An answer is one of those that the case allows: `strict` or `plain` (the API answered, and that rule was charged), or `refused`
  (a 4xx, 501 or 505, and nothing reached the API).
- What the API serves is what was decided on: where `lenient_path` of the path that reached the API is a strict one, under the
  method that reached it, the strict rule was charged.
- The API got one key at most, the one that was charged.

To use it: fill in `{host}` with `Trick.sent`, send it on a connection of its own, and judge by `verdict`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import msgspec

STRICT: Final = 100_001
"""The limit of the strict rules; high enough that no case is denied, and told from PLAIN by its value."""
PLAIN: Final = 900_000
KEY: Final = "demo-tricks-key-001"
OTHER_KEY: Final = "demo-other-key-0002"
OTHER: Final = 700_000
"""The limit of OTHER_KEY, everywhere."""

POLICY: Final = f"""
[[tiers]]
name = "tricked"
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["{PLAIN}/minute"]
  [[tiers.rules]]
  endpoint = "/login"
  methods = ["POST"]
  limits = ["{STRICT}/minute"]
  priority = 9
  [[tiers.rules]]
  endpoint = "/api/secret/*"
  limits = ["{STRICT}/minute"]
  priority = 9
  [[tiers.rules]]
  endpoint = "/api/items/*"
  methods = ["DELETE"]
  limits = ["{STRICT}/minute"]
  priority = 9
[[tiers]]
name = "other"
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["{OTHER}/minute"]
[[api_keys]]
key = "{KEY}"
tier = "tricked"
[[api_keys]]
key = "{OTHER_KEY}"
tier = "other"
"""

REFUSED: Final = ("refused",)
AS_STRICT: Final = ("strict",)
STRICT_OR_REFUSED: Final = ("strict", "refused")
PLAIN_OR_REFUSED: Final = ("plain", "refused")
EITHER: Final = ("strict", "plain", "refused")


class Trick(msgspec.Struct, frozen=True):
    """One request.

    Args:
        name: what is tried.
        request: its bytes, `{host}` where the gateway's address belongs.
        may_be: the verdicts that are right.
    """

    name: str
    request: bytes
    may_be: tuple[str, ...]

    def sent(self, host: str) -> bytes:
        """What to send.

        Args:
            host: `host:port` of the gateway.
        """
        return self.request.replace(b"{host}", host.encode())

    @property
    def method(self) -> str:
        """Of the request line, as a client library needs it to read the answer."""
        return self.request.split(b" ", 1)[0].decode("latin-1")


def verdict(status: int, limit: str | None, reached: Sequence[Mapping[str, Any]]) -> str:
    """What became of a request.

    Args:
        status: that the client got; 0 where the connection was closed without an answer.
        limit: `X-RateLimit-Limit` that the client got.
        reached: what reached the API: `method`, `path` as it came, `headers` with all values by lower-case name.

    Returns:
        `strict`, `plain`, `other` (the limit of OTHER_KEY), `refused`, or, in words, what must never be.
    """
    if not reached:
        return "refused" if status in (0, 501, 505) or 400 <= status < 500 else f"status {status}, and nothing reached the API"
    if len(reached) > 1:
        return f"{len(reached)} requests reached the API"
    if not 200 <= status < 300:
        return f"status {status}, and the API answered"
    seen = reached[0]
    rules = {str(STRICT): "strict", str(PLAIN): "plain", str(OTHER): "other"}
    rule = rules.get(limit or "", f"limit {limit}")
    keys = seen["headers"].get("x-api-key", [])
    if len(keys) > 1:
        return f"keys {keys} reached the API"
    charged = {"strict": KEY, "plain": KEY, "other": OTHER_KEY}.get(rule)
    if [key.strip(" \t") for key in keys] != [charged]:  # blanks around a value are none of it: RFC 9110, section 5.5
        return f"{rule} was charged, and the key {keys} reached the API"
    if is_strict(seen["method"], seen["path"]) and rule == "plain":
        return f"{seen['method']} {seen['path']} was served as {lenient_path(seen['path'])} under the plain rule"
    return rule


def is_strict(method: str, path: str) -> bool:
    """Whether a lenient back end serves what a strict rule is for.

    Args:
        method: as it reached the API.
        path: likewise.
    """
    served = lenient_path(path)
    return (
        (served == "/login" and method == "POST")
        or served.startswith("/api/secret/")
        or (served.startswith("/api/items/") and method == "DELETE")
    )


def lenient_path(path: str) -> str:
    """What an obliging back end would serve: it decodes, knows every way to write a slash, cuts off parameters and tidies up.

    Args:
        path: as it reached the API; may be in absolute form.

    Returns:
        The path of what it serves. It decodes once only, and after it has cut off parameters; case, and a slash, dot or space at
        the end, mean something: all as RFC 3986 has it.
    """
    path = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*", "", path) or "/"
    path = re.split(r"[?#]", path, maxsplit=1)[0]
    path = "/".join(segment.partition(";")[0] for segment in path.split("/"))
    path = unquote_to_bytes(path).decode("utf-8", "replace").replace("\\", "/")
    path = re.sub(r"[\x00-\x1f\x7f]", "", path)
    segments: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    tidy = "/" + "/".join(segments)
    return tidy + "/" if path.endswith("/") and tidy != "/" else tidy


def _request(line: bytes, *headers: bytes, body: bytes = b"", version: bytes = b"HTTP/1.1", key: bytes = KEY.encode()) -> bytes:
    lines = [line + b" " + version, b"Host: {host}", b"Connection: close"]
    lines += [b"X-API-Key: " + key] if key else []
    if body or line.startswith((b"POST", b"PUT")):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, *headers, b"", body])


def _post(path: bytes, *headers: bytes) -> bytes:
    return _request(b"POST " + path, *headers)


def _get(path: bytes, *headers: bytes) -> bytes:
    return _request(b"GET " + path, *headers)


_LOGIN_SPELLINGS: Final[dict[str, tuple[bytes, tuple[str, ...]]]] = {
    "as it is": (b"/login", AS_STRICT),
    "with a query": (b"/login?next=/open", AS_STRICT),
    "with an empty query": (b"/login?", AS_STRICT),
    "with a query that looks like a path": (b"/login?/../open", AS_STRICT),
    "with a slash in the query": (b"/login?x=%2F..%2Fopen", AS_STRICT),
    "with a fragment": (b"/login#open", STRICT_OR_REFUSED),
    "with a fragment behind a query": (b"/login?a#/open", STRICT_OR_REFUSED),
    "with an encoded fragment": (b"/login%23open", PLAIN_OR_REFUSED),
    "with an encoded question mark": (b"/login%3Fopen", PLAIN_OR_REFUSED),
    "with a letter encoded": (b"/%6cogin", STRICT_OR_REFUSED),
    "with all letters encoded": (b"/%6C%6F%67%69%6E", STRICT_OR_REFUSED),
    "with a letter encoded twice": (b"/%256cogin", PLAIN_OR_REFUSED),
    "with the slash encoded": (b"%2Flogin", REFUSED),
    "with an encoded slash before it": (b"/%2Flogin", STRICT_OR_REFUSED),
    "with an encoded slash in lower case": (b"/%2flogin", STRICT_OR_REFUSED),
    "with an encoded slash, twice": (b"/%252Flogin", PLAIN_OR_REFUSED),
    "with two slashes": (b"//login", STRICT_OR_REFUSED),
    "with three slashes": (b"///login", STRICT_OR_REFUSED),
    "with two slashes at the end": (b"/login//", PLAIN_OR_REFUSED),
    "with a dot segment": (b"/./login", STRICT_OR_REFUSED),
    "with dot segments": (b"/open/../login", STRICT_OR_REFUSED),
    "with dot segments above the root": (b"/../../login", STRICT_OR_REFUSED),
    "with encoded dot segments": (b"/open/%2e%2e/login", STRICT_OR_REFUSED),
    "with half encoded dot segments": (b"/open/.%2E/login", STRICT_OR_REFUSED),
    "with dots encoded twice": (b"/open/%252e%252e/login", PLAIN_OR_REFUSED),
    "with an encoded slash between dots": (b"/open/..%2flogin", STRICT_OR_REFUSED),
    "with dots and path parameters": (b"/open/..;x/login", STRICT_OR_REFUSED),
    "with a dot segment at the end": (b"/login/.", PLAIN_OR_REFUSED),
    "with dots at the end": (b"/login/x/..", STRICT_OR_REFUSED),
    "with a path parameter": (b"/login;x=1", STRICT_OR_REFUSED),
    "with an empty path parameter": (b"/login;", STRICT_OR_REFUSED),
    "with an encoded path parameter": (b"/login%3Bx", PLAIN_OR_REFUSED),
    "with a backslash": (b"/open\\..\\login", STRICT_OR_REFUSED),
    "with a backslash before it": (b"/\\login", STRICT_OR_REFUSED),
    "with an encoded backslash": (b"/%5clogin", STRICT_OR_REFUSED),
    "with a NUL at the end": (b"/login%00", STRICT_OR_REFUSED),
    "with a raw NUL": (b"/login\0", REFUSED),
    "with a line break at the end": (b"/login%0d%0a", STRICT_OR_REFUSED),
    "with a header behind a line break": (b"/login%0d%0aX-API-Key:%20demo-other-key-0002", EITHER),
    "with a line feed": (b"/login%0A", STRICT_OR_REFUSED),
    "with a raw line feed": (b"/login\nX-API-Key: demo-other-key-0002", REFUSED),
    "with a tab": (b"/login%09", STRICT_OR_REFUSED),
    "with a raw tab": (b"/login\t", REFUSED),
    "with a space at the end": (b"/login%20", PLAIN_OR_REFUSED),
    "with a raw space": (b"/login /open", REFUSED),
    "with a raw DEL": (b"/login\x7f", STRICT_OR_REFUSED),
    "with a dot at the end": (b"/login.", PLAIN_OR_REFUSED),
    "with a slash at the end": (b"/login/", PLAIN_OR_REFUSED),
    "in upper case": (b"/LOGIN", PLAIN_OR_REFUSED),
    "with a broken escape": (b"/login%", REFUSED),
    "with an escape of no hex": (b"/login%zz", REFUSED),
    "with an IIS escape": (b"/%u006cogin", REFUSED),
    "with an overlong slash": (b"/open%c0%af..%c0%aflogin", EITHER),
    "with an overlong letter": (b"/%c1%acogin", EITHER),
    "with invalid UTF-8": (b"/login%ff", PLAIN_OR_REFUSED),
    "with raw invalid UTF-8": (b"/login\xff", PLAIN_OR_REFUSED),
    "with a fullwidth letter": ("/ｌogin".encode(), PLAIN_OR_REFUSED),
    "with a fullwidth slash": ("/open／../login".encode(), EITHER),
    "in absolute form": (b"http://{host}/login", STRICT_OR_REFUSED),
    "in absolute form of another host": (b"http://open.example/login", STRICT_OR_REFUSED),
    "in absolute form with a user": (b"http://open@{host}/login", STRICT_OR_REFUSED),
    "in absolute form with another scheme": (b"gopher://{host}/login", STRICT_OR_REFUSED),
    "in absolute form with two slashes": (b"http://{host}//login", STRICT_OR_REFUSED),
    "in absolute form with dots": (b"http://{host}/open/../login", STRICT_OR_REFUSED),
    "in absolute form within the path": (b"/http://{host}/login", PLAIN_OR_REFUSED),
    "without a slash": (b"login", REFUSED),
    "as a host and port": (b"login:80", REFUSED),
    "as an asterisk": (b"*", REFUSED),
    "as a query alone": (b"?/login", REFUSED),
    "too long": (b"/login?" + b"x" * 70_000, REFUSED),
    "with a long query": (b"/login?" + b"x" * 5_000, STRICT_OR_REFUSED),
    "with many dot segments": (b"/open" + b"/a/.." * 500 + b"/../login", STRICT_OR_REFUSED),
}

_SECRET_SPELLINGS: Final[dict[str, tuple[bytes, tuple[str, ...]]]] = {
    "as it is": (b"/api/secret/1", AS_STRICT),
    "deeper": (b"/api/secret/1/x/y", AS_STRICT),
    "from an open path": (b"/api/open/../secret/1", STRICT_OR_REFUSED),
    "with the slash between encoded": (b"/api%2fsecret/1", STRICT_OR_REFUSED),
    "with the last slash encoded": (b"/api/secret%2f1", STRICT_OR_REFUSED),
    "with two slashes between": (b"/api//secret/1", STRICT_OR_REFUSED),
    "with a parameter within": (b"/api;v=1/secret/1", STRICT_OR_REFUSED),
    "with an encoded letter within": (b"/api/s%65cret/1", STRICT_OR_REFUSED),
    "with a dot segment within": (b"/api/./secret/1", STRICT_OR_REFUSED),
    "with dots that lead out again": (b"/api/secret/../open", PLAIN_OR_REFUSED),
    "with encoded dots that lead out again": (b"/api/secret/%2e%2e/open", EITHER),
    "with an accent in two spellings": ("/api/secret/é".encode(), STRICT_OR_REFUSED),
    "with an accent, encoded": (b"/api/secret/%c3%A9", AS_STRICT),
    "in mixed case": (b"/Api/Secret/1", PLAIN_OR_REFUSED),
}

_FORGED: Final = {
    "X-Original-URI": b"/open",
    "X-Original-URL": b"/open",
    "X-Original-Method": b"GET",
    "X-Rewrite-URL": b"/open",
    "X-Forwarded-Uri": b"/open",
    "X-Forwarded-Path": b"/open",
    "X-Forwarded-Prefix": b"/open",
    "X-Forwarded-Method": b"GET",
    "X-Forwarded-Host": b"open.example",
    "X-Forwarded-For": b"198.51.100.9",
    "X-Real-IP": b"198.51.100.9",
    "Forwarded": b"for=198.51.100.9;host=open.example",
    "X-HTTP-Method-Override": b"GET",
    "X-HTTP-Method": b"GET",
    "X-Method-Override": b"GET",
    "X-Tidegate-Denied-Status": b"200",
    "X-Tidegate-Status": b"204",
    "X-Accel-Redirect": b"/open",
    "X-Accel-Expires": b"60",
    "Connection": b"close, X-API-Key, X-Original-URI, X-Original-Method, X-Real-IP",
}
_OVERRIDES: Final = ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override")
_KEY: Final = b"X-API-Key: " + KEY.encode()
_OTHER_KEY: Final = b"X-API-Key: " + OTHER_KEY.encode()
_ITEM: Final = b"/api/items/1"

TRICKS: Final[tuple[Trick, ...]] = (
    *(Trick(f"POST /login {how}", _post(path), may_be) for how, (path, may_be) in _LOGIN_SPELLINGS.items()),
    *(Trick(f"/api/secret {how}", _get(path), may_be) for how, (path, may_be) in _SECRET_SPELLINGS.items()),
    *(
        Trick(f"a forged {name}", _post(b"/login", name.encode() + b": " + value), STRICT_OR_REFUSED)
        for name, value in _FORGED.items()
    ),
    *(
        Trick(f"{name} within a POST that is no DELETE", _post(_ITEM, name.encode() + b": DELETE"), PLAIN_OR_REFUSED)
        for name in _OVERRIDES
    ),
    Trick("DELETE", _request(b"DELETE " + _ITEM), AS_STRICT),
    Trick("delete in lower case", _request(b"delete " + _ITEM), STRICT_OR_REFUSED),
    Trick("post in mixed case", _request(b"PoSt /login", b"Content-Length: 0"), STRICT_OR_REFUSED),
    Trick("a method that is none", _request(b"P0ST /login"), PLAIN_OR_REFUSED),
    Trick("a method with a NUL", _request(b"POST\0 /login", b"Content-Length: 0"), REFUSED),
    Trick("two spaces before the path", _request(b"POST  /login"), STRICT_OR_REFUSED),
    Trick("CONNECT", _request(b"CONNECT {host}"), REFUSED),
    Trick("TRACE", _request(b"TRACE /login"), REFUSED),
    Trick("two keys, the other one last", _post(b"/login", _OTHER_KEY), ("strict", "refused")),
    Trick("two keys, the other one first", _request(b"POST /login", _OTHER_KEY, _KEY, key=b""), ("other", "refused")),
    Trick("the same key twice", _post(b"/login", _KEY), STRICT_OR_REFUSED),
    Trick("two keys in one line", _request(b"POST /login", key=KEY.encode() + b", " + OTHER_KEY.encode()), REFUSED),
    Trick("a key in another case", _request(b"POST /login", b"x-aPi-kEY: " + KEY.encode(), key=b""), AS_STRICT),
    Trick("a key with underscores beside it", _post(b"/login", b"X_API_Key: " + OTHER_KEY.encode()), STRICT_OR_REFUSED),
    Trick("a key with underscores alone", _request(b"POST /login", b"X_API_Key: " + OTHER_KEY.encode(), key=b""), REFUSED),
    Trick(
        "a space before the colon",
        _request(b"POST /login", b"X-API-Key : " + OTHER_KEY.encode(), _KEY, key=b""),
        STRICT_OR_REFUSED,
    ),
    Trick("a folded header", _post(b"/login", b"X-Note: a\r\n X-API-Key: " + OTHER_KEY.encode()), STRICT_OR_REFUSED),
    Trick("a tab before the key", _request(b"POST /login", key=b"\t" + KEY.encode()), STRICT_OR_REFUSED),
    Trick("a tab behind the key", _request(b"POST /login", key=KEY.encode() + b"\t"), STRICT_OR_REFUSED),
    Trick("a NUL in the key", _request(b"POST /login", key=KEY.encode() + b"\0"), REFUSED),
    Trick("a line feed behind the key", _request(b"POST /login", key=KEY.encode() + b"\nX-Real-IP: 1.2.3.4"), STRICT_OR_REFUSED),
    Trick("a bare CR behind the key", _request(b"POST /login", key=KEY.encode() + b"\rX-Real-IP: 1.2.3.4"), STRICT_OR_REFUSED),
    Trick("an empty key", _request(b"POST /login", key=b" "), REFUSED),
    Trick("no key", _request(b"POST /login", key=b""), REFUSED),
    Trick("a huge key", _request(b"POST /login", key=b"k" * 9_000), REFUSED),
    Trick("a key of other letters", _request(b"POST /login", key="dëmo".encode()), REFUSED),
    Trick("HTTP/1.0", _request(b"POST /login", version=b"HTTP/1.0"), STRICT_OR_REFUSED),
    Trick("HTTP/0.9", b"POST /login\r\n\r\n", REFUSED),
    Trick("HTTP/1.2", _request(b"POST /login", version=b"HTTP/1.2"), STRICT_OR_REFUSED),
    Trick("HTTP/2.0 in words", _request(b"POST /login", version=b"HTTP/2.0"), REFUSED),
    Trick("no Host", b"POST /login HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n" + _KEY + b"\r\n\r\n", REFUSED),
    Trick("two Hosts", _post(b"/login", b"Host: open.example"), STRICT_OR_REFUSED),
    Trick("a Host with a path", _request(b"POST /login").replace(b"{host}", b"{host}/open"), STRICT_OR_REFUSED),
    Trick(
        "a length and chunks",
        _request(
            b"POST /open",
            b"Transfer-Encoding: chunked",
            body=b"0\r\n\r\nPOST /login HTTP/1.1\r\nHost: a\r\n" + _KEY + b"\r\n\r\n",
        ),
        PLAIN_OR_REFUSED,
    ),
    Trick(
        "two lengths",
        _request(b"POST /open", b"Content-Length: 0", body=b"POST /login HTTP/1.1\r\nHost: a\r\n" + _KEY + b"\r\n\r\n"),
        REFUSED,
    ),
    Trick(
        "chunks with a space before the colon",
        _request(b"POST /open", b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"),
        PLAIN_OR_REFUSED,
    ),
    Trick("an unknown transfer encoding", _post(b"/login", b"Transfer-Encoding: xchunked"), REFUSED),
    Trick("a length with a sign", _request(b"POST /open", b"Content-Length: +0").replace(b"Content-Length: 0\r\n", b""), REFUSED),
    Trick(
        "a request within the body",
        _request(b"POST /open", body=b"POST /login HTTP/1.1\r\nHost: a\r\n" + _KEY + b"\r\n\r\n"),
        PLAIN_OR_REFUSED,
    ),
    Trick("the way Tidegate is asked", _get(b"/_tidegate"), PLAIN_OR_REFUSED),
    Trick("the way Tidegate is asked, encoded", _get(b"/%5ftidegate"), PLAIN_OR_REFUSED),
)
