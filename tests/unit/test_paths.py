"""One spelling for each path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.paths import MAX_PATH_BYTES, canonical_path

ACCEPTED = {
    "/": "/",
    "/api/v1/items": "/api/v1/items",
    "/api/v1/items/": "/api/v1/items/",
    "/.well-known/x": "/.well-known/x",
    "/a..b/c.": "/a..b/c.",
    "/...": "/...",
    "/~user/(1)!*'": "/~user/(1)!*'",
    "/caf%C3%A9": "/caf%C3%A9",
    "/caf%c3%a9": "/caf%C3%A9",
    "/café": "/caf%C3%A9",
    "/a%20b": "/a%20b",
    "/a%3Bb": "/a%3Bb",
    "/a%25b": "/a%25b",
    "/[x]": "/%5Bx%5D",
    '/"<>^`{|}': "/%22%3C%3E%5E%60%7B%7C%7D",
    "/a%3fb": "/a%3Fb",
}
REFUSED = {
    "": "begins",
    "api": "begins",
    "*": "begins",
    "http://host/a": "begins",
    "//": "//",
    "//a": "//",
    "/a//b": "//",
    "/a//": "//",
    "/.": "dot",
    "/..": "dot",
    "/a/./b": "dot",
    "/a/../b": "dot",
    "/%2e%2e/b": "'.'",
    "/%61pi": "'a'",
    "/a%7Eb": "'~'",
    "/a%2Fb": "slash",
    "/a%2fb": "slash",
    "/a%5cb": "backslash",
    "/a\\b": "backslash",
    "/a;x=1": ";",
    "/a%00": "control",
    "/a%0d%0aX": "control",
    "/a%7f": "control",
    "/a b": "space",
    "/a\tb": "control",
    "/a\r\nb": "control",
    "/a\x00": "control",
    "/a\x7f": "control",
    "/a?b": "query",
    "/a#b": "query",
    "/a%": "hex",
    "/a%2": "hex",
    "/a%zz": "hex",
    "/" + "a" * MAX_PATH_BYTES: "at most",
    "/" + "é" * (MAX_PATH_BYTES // 4): "at most",
    "/\ud800": "Unicode",
}


@pytest.mark.parametrize("path", ACCEPTED)
def test_accepted(path: str) -> None:
    assert canonical_path(path) == (ACCEPTED[path], "")


@pytest.mark.parametrize("path", REFUSED)
def test_refused_with_the_remedy(path: str) -> None:
    canonical, remedy = canonical_path(path)
    assert canonical is None
    assert REFUSED[path] in remedy


@given(st.text(max_size=40) | st.text("/.%;aA2fF5c?#\\é ", max_size=20).map("/".__add__))
def test_never_raises_and_is_idempotent(path: str) -> None:
    canonical, remedy = canonical_path(path)
    assert (canonical is None) == bool(remedy)
    if canonical is not None:
        assert canonical_path(canonical) == (canonical, "")
        assert canonical.isascii()
        assert canonical.isprintable()
