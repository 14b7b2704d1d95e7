"""The table of tricks judges rightly: what it would let pass is looked at here, without a gateway."""

from __future__ import annotations

import pytest

from tests.cases.gateway_tricks import KEY, OTHER_KEY, PLAIN, POLICY, STRICT, TRICKS, is_strict, lenient_path, verdict
from tidegate.policy.toml_reader import parse_policy

VERDICTS = {"strict", "plain", "other", "refused"}


def test_names_are_unique_and_verdicts_known() -> None:
    assert len({trick.name for trick in TRICKS}) == len(TRICKS)
    assert all(set(trick.may_be) <= VERDICTS and trick.may_be for trick in TRICKS)
    parse_policy(POLICY)


@pytest.mark.parametrize(
    "path",
    ["/login", "//login", "/x/../login", "/%6cogin", "/%2Flogin", "/login;x", "/\\login", "/login%00", "/login?x#y",
     "http://h/login", "/a/..;x/login", "/a/%2e%2e/login"],
)  # fmt: skip
def test_a_lenient_back_end_serves_the_login(path: str) -> None:
    assert lenient_path(path) == "/login"
    assert is_strict("POST", path)
    assert not is_strict("GET", path)


@pytest.mark.parametrize(
    "path",
    [
        "/login/",
        "/LOGIN",
        "/login.",
        "/login%20",
        "/login%3Bx",
        "/%256cogin",
        "/http://h/login",
        "/api/secret",
        "/api/secretive/1",
    ],
)
def test_these_are_other_paths(path: str) -> None:
    assert not is_strict("POST", path)


def _seen(path: str = "/login", method: str = "POST", *keys: str) -> dict[str, object]:
    return {"method": method, "path": path, "headers": {"x-api-key": list(keys or (KEY,))}}


def test_what_must_never_be_is_reported_in_words() -> None:
    strict, plain = str(STRICT), str(PLAIN)
    assert verdict(200, strict, [_seen()]) == "strict"
    assert verdict(200, plain, [_seen("/open")]) == "plain"
    assert verdict(400, None, []) == "refused"
    for wrong in (
        verdict(200, plain, [_seen()]),
        verdict(200, plain, [_seen("//login")]),
        verdict(200, strict, [_seen("/login", "POST", KEY, OTHER_KEY)]),
        verdict(200, strict, [_seen("/login", "POST", OTHER_KEY)]),
        verdict(200, strict, [_seen(), _seen()]),
        verdict(200, None, [_seen()]),
        verdict(500, None, []),
        verdict(200, None, []),
        verdict(403, None, [_seen()]),
    ):
        assert wrong not in VERDICTS
