"""One spelling for each path."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cpu_time import assert_cpu_below, cpu_s
from tidegate.errors import SettingsError
from tidegate.policy.paths import DEFERRED, MAX_PATH_BYTES, STRICT, PathRules, canonical_path, quote_path

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
def test_rejected_with_the_remedy(path: str) -> None:
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


@given(st.text("/aA0fF%3cC;éß€|^ .~\U0001f600", max_size=60).map("/".__add__))
def test_what_is_encoded_is_what_the_standard_library_encodes(path: str) -> None:
    canonical, _ = canonical_path(path)
    if canonical is not None:
        encoded = quote(path, safe="/%!$&'()*+,=:@~")
        assert canonical == re.sub("%..", lambda escape: escape.group().upper(), encoded)


@given(st.text(st.characters(codec="utf-8"), max_size=60).map("/".__add__))
def test_a_decoded_path_is_quoted_as_the_standard_library_does(path: str) -> None:
    assert quote_path(path) == quote(path, safe="/:@!$&'()*+,=~-._%")


def test_a_decoded_path_of_any_text_can_be_quoted() -> None:
    assert canonical_path(quote_path("/\ud800"))[0] == "/%ED%A0%80"
    assert canonical_path(quote_path("/" + "é" * MAX_PATH_BYTES))[0] is None


def test_of_several_bad_escapes_the_first_is_named() -> None:
    for first, said in (("%7E", "'%7E'"), ("%0a", "'%0a'"), ("%%41", "hex"), ("%5c", "'%5c'"), ("%4", "hex")):
        for good in ("", "%C3%a9", "a%20" * 50):
            assert said in canonical_path(f"/{good}{first}/%41%zz%2f")[1]


HOSTILE = {
    "odd characters": "/" + "|" * 7600,
    "odd characters that just fit": "/" + "|" * 2700,
    "every second one odd": "/" + "a|" * 2000,
    "characters of all scripts": "/" + "".join(chr(0x4E00 + 7 * number) for number in range(880)),
    "lower-case escapes": "/" + "%c3%a9" * 1300,
    "upper-case escapes": "/" + "%C3" * 2700,
    "a bad escape at the end": "/" + "%C3" * 2700 + "%2f",
    "a space at the end": "/" + "a" * 7600 + " ",
    "many segments": "/" + "/a" * 3800 + "|",
    "segments that begin with dots": "/" + "/..." * 2000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_path_costs_many_times_a_plain_one(name: str) -> None:
    """The worst of these cost 335 times a plain path of their length once, and 4 times now; bounded at 40."""

    def least_s(path: str) -> float:
        return min(cpu_s(lambda: canonical_path(path)) for _ in range(20))

    plain = "/" + "a" * (len(HOSTILE[name].encode()) - 1)
    assert_cpu_below(40 * max(least_s(plain), 1e-5), lambda: canonical_path(HOSTILE[name]))


def test_the_length_is_that_of_the_result() -> None:
    most = (MAX_PATH_BYTES - 1) // 3
    assert canonical_path("/" + "|" * most)[0] == "/" + "%7C" * most
    refused, remedy = canonical_path("/" + "|" * (most + 1))
    assert refused is None
    assert "once it is percent-encoded" in remedy


SLASHES = PathRules.of(["/projects/*", "/files/*/raw"])
DECODING = PathRules.of(decode_unreserved=True)
ALLOWED = [
    (SLASHES, "/projects/a%2fb", "/projects/a%2Fb"),
    (SLASHES, "/projects/a%2Fb%2Fc/issues", "/projects/a%2Fb%2Fc/issues"),
    (SLASHES, "/projects/a%2F", "/projects/a%2F"),
    (SLASHES, "/projects/é%2F|", "/projects/%C3%A9%2F%7C"),
    (SLASHES, "/files/a%2Fb/raw", "/files/a%2Fb/raw"),
    (DECODING, "/%7Euser", "/~user"),
    (DECODING, "/%61%70%69/%2d%2E%5f", "/api/-._"),
    (DECODING, "/%2541", "/%2541"),
    (DECODING, "/%7e|é", "/~%7C%C3%A9"),
    (DEFERRED, "/a%2fb/%7e", "/a%2Fb/%7E"),
]
STILL_REFUSED = [
    (SLASHES, "/other/a%2Fb", "paths.encoded_slashes"),
    (SLASHES, "/files/a%2Fb", "paths.encoded_slashes"),
    (SLASHES, "/projects/..%2Fadmin", "dot"),
    (SLASHES, "/projects/a%2F..%2F..%2Fadmin", "dot"),
    (SLASHES, "/projects/a%2F.", "dot"),
    (SLASHES, "/projects/a%2F%2Fb", "empty"),
    (SLASHES, "/projects/%2Fb", "empty"),
    (SLASHES, "/projects/a%5Cb", "backslash"),
    (SLASHES, "/projects/a%2fb%7E", "'~'"),
    (SLASHES, "/projects/a%2Fb%00", "control"),
    (DECODING, "/a%2Fb", "slash"),
    (DECODING, "/%2e%2e/b", "dot"),
    (DECODING, "/a/%2E", "dot"),
    (DECODING, "/%", "hex"),
    (DECODING, "/%2%35", "hex"),
    (STRICT, "/projects/a%2Fb", "paths.encoded_slashes"),
]


@pytest.mark.parametrize(("rules", "path", "canonical"), ALLOWED)
def test_what_an_api_may_let_through(rules: PathRules, path: str, canonical: str) -> None:
    assert canonical_path(path, rules) == (canonical, "")
    assert canonical_path(canonical, rules) == (canonical, "")
    assert canonical_path(path)[0] is None or "%25" in path


@pytest.mark.parametrize(("rules", "path", "said"), STILL_REFUSED)
def test_what_no_setting_lets_through(rules: PathRules, path: str, said: str) -> None:
    canonical, remedy = canonical_path(path, rules)
    assert canonical is None
    assert said in remedy


@given(st.text("/.%2fF5cCeE7a~", max_size=20).map("/".__add__), st.sampled_from([SLASHES, DECODING, DEFERRED]))
def test_whatever_is_let_through_decodes_to_what_is_safe(path: str, rules: PathRules) -> None:
    canonical, remedy = canonical_path(path, rules)
    assert (canonical is None) == bool(remedy)
    if canonical is None:
        return
    assert canonical_path(canonical, rules) == (canonical, "")
    if rules.unreserved != "keep":
        decoded = unquote(canonical).split("/")[1:]
        assert not {".", ".."} & set(decoded) or "%25" in canonical
        assert "" not in decoded[:-1]


def test_unreserved_escapes_are_decoded_in_few_passes() -> None:
    escapes = "".join(f"%{byte:02{case}}" for byte in b"abcdefghijklmnopqrstuvwxyzABCXYZ0123456789-._~" for case in "xX")
    path = "/" + (escapes * 40)[: MAX_PATH_BYTES // 3 * 3 - 3]

    def work() -> None:
        for _ in range(10):
            assert canonical_path(path, DECODING)[0] is not None

    assert_cpu_below(1, work)


def test_a_pattern_that_no_path_matches_is_rejected() -> None:
    for pattern in ("projects/*", "", "/" + "a" * 1024):
        with pytest.raises(SettingsError, match=r"paths\.encoded_slashes"):
            PathRules.of([pattern])
