"""`[jwt]` and `[[namespaces]]` of a policy file: read, written, refused with file and line."""

from __future__ import annotations

import importlib.util

import pytest

from tidegate.errors import PolicyError
from tidegate.policy.toml_reader import parse_policy
from tidegate.policy.toml_writer import policy_text

TEXT = """\
[attributes]
org = "jwt:org_id"

[jwt]
jwks = "https://issuer.example/jwks.json"
issuer = "https://issuer.example"
audience = ["api", "web"]
header = "X-Token"
algorithms = ["ES256"]
leeway_s = 5

[[tiers]]
name = "free"

[[namespaces]]
name = "emails"
limits = ["10/minute", "100/day"]
algorithm = "fixed_window"
on_failure = "deny"
  [[namespaces.overrides]]
  subject = "vip-*"
  limits = ["20/minute"]

[[namespaces]]
name = "jobs"
"""


def test_what_is_read_is_written_again() -> None:
    policy = parse_policy(TEXT)
    assert policy.jwt is not None
    assert policy.jwt.audience == ("api", "web")
    assert [namespace.name for namespace in policy.namespaces] == ["emails", "jobs"]
    assert parse_policy(policy_text(policy)) == policy


def test_without_pyjwt_the_policy_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PolicyError, match=r"tidegate\[jwt\]"):
        parse_policy(TEXT)


def test_one_audience_may_be_a_text_and_namespaces_need_no_tier() -> None:
    policy = parse_policy('[jwt]\njwks = "keys.json"\naudience = "api"\n[[namespaces]]\nname = "jobs"\n')
    assert policy.jwt is not None
    assert policy.jwt.audience == ("api",)
    assert policy_text(policy) == policy_text(parse_policy(policy_text(policy)))


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("jwt = 7", "[jwt]", 1),
        ("[jwt]\nissuer = 'a'", "'jwks' is missing", 1),
        ("[jwt]\njwks = 'http://other.example/'", "https://", 2),
        ("[jwt]\njwks = 'k'\nalgorithms = ['HS256']", "HMAC", 3),
        ("[jwt]\njwks = 'k'\nleeway_s = 1000", "leeway_s", 3),
        ("[jwt]\njwks = 'k'\nkeys = 'x'", "unknown field 'keys'", 3),
        ("[[namespaces]]\nlimits = ['1/s']", "'name' is missing", 1),
        ("[[namespaces]]\nname = 'a b'", "namespace name", 2),
        ("[[namespaces]]\nname = 'a'\n[[namespaces]]\nname = 'a'", "twice", 4),
        ("[[namespaces]]\nname = 'a'\nlimits = ['often']", "'often'", 3),
        ("[[namespaces]]\nname = 'a'\nalgorithm = 'magic'", "magic", 3),
        ("[[namespaces]]\nname = 'a'\n[[namespaces.overrides]]\nsubject = 'x'", "'limits' is missing", 3),
        ("[[namespaces]]\nname = 'a'\n[[namespaces.overrides]]\nsubject = ''\nlimits = ['1/s']", "override subject", 1),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(text: str, words: str, line: int) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_policy(text + '\n[[tiers]]\nname = "free"\n', "p.toml")
    assert words in refused.value.reason
    assert refused.value.line == line
