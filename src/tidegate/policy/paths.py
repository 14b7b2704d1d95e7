"""One spelling for each path, so that no rule is passed by spelling its path another way.

Source of the rules: RFC 3986, sections 2.3, 3.3 and 6.2.2; what is refused there is what gateways and backends are known
to read differently (empty and dot segments, encoded slashes, path parameters, backslashes).

An API that has such paths names them: `PathRules` lets encoded slashes through where its patterns say so, and reads escapes of
unreserved characters as the characters. Both are off by default.

A path costs about the same whatever its characters: all of them are examined in C, and the length of the result is
known, and refused where it is too large, before anything is rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from tidegate.errors import SettingsError
from tidegate.policy.escapes import Encoder, Escapes
from tidegate.policy.globs import Glob

MAX_PATH_BYTES: Final = 8192

_PLAIN: Final = re.compile(r"/[A-Za-z0-9\-._~!$&'()*+,=:@/]*", re.ASCII)
_KEPT: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,=:@/%"
_UNRESERVED: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_NOT_CONTROL: Final = bytes((*range(0x21, 0x7F), *range(0x80, 0x100)))
_ENCODED: Final = bytes(byte for byte in _NOT_CONTROL if byte not in b"\\;#?" + _KEPT)
_ENCODER: Final = Encoder(_KEPT)
_REFUSED_BYTES: Final = {0x2F: "an encoded slash", 0x5C: "an encoded backslash"}
_REFUSED_ESCAPES: Final = frozenset(range(0x20)) | {0x7F} | _UNRESERVED | _REFUSED_BYTES.keys()


# By whether encoded slashes, and escapes of unreserved characters, are let through.
_ESCAPES: Final = {
    (slashes, unreserved): Escapes(
        _REFUSED_ESCAPES - (frozenset((0x2F,)) if slashes else frozenset()) - (_UNRESERVED if unreserved else frozenset())
    )
    for slashes in (False, True)
    for unreserved in (False, True)
}
_ESCAPE: Final = re.compile(rb"%[0-9A-Fa-f]{2}")
_UNRESERVED_ESCAPE: Final = re.compile(rb"%(?:2[DE]|3[0-9]|[46][1-9A-F]|5[0-9AF]|7[0-9AE])")
_DOT_SEGMENTS: Final = "dot segments ('.', '..') are refused: send the path they resolve to"
_TOO_LONG: Final = f"a path has at most {MAX_PATH_BYTES} bytes"


class PathRules(msgspec.Struct, frozen=True):
    """What an API lets through beyond what is safe for every API.

    Args:
        encoded_slashes: patterns with `*` for the paths that may have `%2F`; it stays `%2F`, and is no slash to any rule.
        unreserved: what becomes of an escape of an unreserved character, such as `%7E` for `~`: refuse it, decode it, or keep it.
    """

    encoded_slashes: tuple[Glob, ...] = ()
    unreserved: Literal["refuse", "decode", "keep"] = "refuse"

    @classmethod
    def of(cls, encoded_slashes: Iterable[str] = (), decode_unreserved: bool = False) -> PathRules:
        """Make them from settings.

        Args:
            encoded_slashes: patterns such as `/projects/*`.
            decode_unreserved: whether `%7E` is read as `~`.

        Raises:
            SettingsError: naming a pattern that no path can match.
        """
        globs = []
        for pattern in encoded_slashes:
            if not pattern.startswith("/") or len(pattern) > _MAX_PATTERN:
                raise SettingsError(
                    f"setting paths.encoded_slashes has {pattern[:80]!r}: a pattern begins with '/' and has at most "
                    f"{_MAX_PATTERN} characters, such as '/projects/*'"
                )
            globs.append(Glob(pattern))
        return cls(tuple(globs), "decode" if decode_unreserved else "refuse")


STRICT: Final = PathRules()
DEFERRED: Final = PathRules((Glob("*"),), "keep")
"""For a path that is sent on to a server, which decides by rules of its own."""
_MAX_PATTERN: Final = 1024


def canonical_path(path: str, rules: PathRules = STRICT) -> tuple[str | None, str]:
    """Check how a path is spelled.

    Args:
        path: as it came, without query; percent-encoded, or with raw non-ASCII characters.
        rules: what the API lets through beyond what is safe for every API.

    Returns:
        `(path, "")` if the spelling is canonical (hex digits made upper-case and sloppy characters encoded, which
        changes no meaning); `(None, reason)` with the remedy in the reason if it is refused. Costs 0.3 µs for short plain
        paths, 25 µs for plain ones of 8 KB, and at most five times that for any other of that size.
    """
    if len(path) <= MAX_PATH_BYTES and _PLAIN.fullmatch(path) and "//" not in path and "/." not in path:
        return path, ""
    return _examine(path, rules)


def quote_path(path: str) -> str:
    """Percent-encode a path that a server has decoded already.

    Args:
        path: decoded; a `%` in it stays, so that it is refused unless it begins an escape.

    Returns:
        The path, for `canonical_path`; itself where it is too long for that anyway.
    """
    if len(path) > MAX_PATH_BYTES:
        return path
    raw = path.encode(errors="surrogatepass")
    return _ENCODER.encode(raw, raw.translate(None, _KEPT))


def _examine(path: str, rules: PathRules) -> tuple[str | None, str]:
    if not path.startswith("/"):
        return None, "a path begins with '/'"
    if len(path) > MAX_PATH_BYTES:
        return None, _TOO_LONG
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        return None, "a path is valid Unicode"
    odd = raw.translate(None, _KEPT)
    # Each of them takes two bytes more once it is encoded.
    if len(raw) + 2 * len(odd) > MAX_PATH_BYTES:
        return None, _TOO_LONG + (" once it is percent-encoded" if odd else "")
    if odd and odd.translate(None, _ENCODED):
        return None, _why_raw(odd)
    if "//" in path:
        return None, "empty segments ('//') are refused: send a single '/'"
    if "%" in path:
        raw, bad = _ESCAPES[bool(rules.encoded_slashes), rules.unreserved != "refuse"].upper_case(raw)
        if bad >= 0:
            return None, _why_escape(raw[bad : bad + 3])
        if rules.unreserved == "decode":
            raw = _decode_unreserved(raw)
        if b"%2F" in raw:
            return _with_slashes(_ENCODER.encode(raw, odd), rules)
    if b"/." in raw and _has_dot_segment(raw):
        return None, _DOT_SEGMENTS
    return _ENCODER.encode(raw, odd), ""


def _with_slashes(path: str, rules: PathRules) -> tuple[str | None, str]:
    """A path with encoded slashes. Whoever decodes them must not find in it what is refused when it is sent plainly."""
    if not any(glob.matches(path) for glob in rules.encoded_slashes):
        return None, _why_escape(b"%2F")
    decoded = path.replace("%2F", "/")
    if "//" in decoded:
        return None, "empty segments ('//', also with '%2F') are refused: send a single '/'"
    if _has_dot_segment(decoded.encode()):
        return None, _DOT_SEGMENTS
    return path, ""


def _decode_unreserved(raw: bytes) -> bytes:
    """Escapes of unreserved characters as the characters; '%' is none, so that nothing decoded begins an escape."""
    for escape in set(_UNRESERVED_ESCAPE.findall(raw)):
        raw = raw.replace(escape, bytes((int(escape[1:], 16),)))
    return raw


def _has_dot_segment(raw: bytes) -> bool:
    return b"/./" in raw or b"/../" in raw or raw.endswith((b"/.", b"/.."))


def _why_raw(odd: bytes) -> str:
    if odd.translate(None, _NOT_CONTROL):
        return "a path has no spaces or control characters: percent-encode them"
    if 0x5C in odd:
        return "a path has no backslashes: use '/'"
    if 0x3B in odd:
        return "path parameters (';') are refused because backends read them differently: encode ';' as '%3B'"
    return "a path has no query or fragment"


def _why_escape(escape: bytes) -> str:
    if not _ESCAPE.fullmatch(escape):
        return "'%' must be followed by two hex digits"
    byte, shown = int(escape[1:], 16), escape.decode()
    if byte in _REFUSED_BYTES:
        remedy = "; name the paths that need it in the setting paths.encoded_slashes" if byte == 0x2F else ""
        return f"{shown!r} is {_REFUSED_BYTES[byte]}, which backends read differently{remedy}"
    if byte in _UNRESERVED:
        return f"{shown!r} is another spelling of {chr(byte)!r}: send {chr(byte)!r}"
    return f"{shown!r} is an encoded control character"
