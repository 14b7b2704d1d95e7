"""Which rule answers: the index against a scan of all rules."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.policy.limits import Limit
from tidegate.policy.matching import CompiledTier, subject_of
from tidegate.policy.model import Tier
from tidegate.policy.overrides import Override
from tidegate.policy.rules import Rule, Subject


def tier_of(*rules: Rule, limits: tuple[str, ...] = ()) -> CompiledTier:
    return CompiledTier(Tier.make("t", rules, limits))


def matches(endpoint: str, path: str) -> bool:
    """The meaning of a pattern, said once more: by an expression of its own."""
    parts = re.split(r"(\*|\{\w*\})", endpoint)
    expression = "".join(".*" if part == "*" else "[^/]+" if part.startswith("{") else re.escape(part) for part in parts)
    return re.fullmatch(expression, path, re.DOTALL) is not None


@pytest.mark.parametrize(
    ("endpoint", "path", "expected"),
    [
        ("/login", "/login", True),
        ("/login", "/login/", False),
        ("/login", "/Login", False),
        ("/api/*", "/api/", True),
        ("/api/*", "/api/a/b", True),
        ("/api/*", "/api", False),
        ("/api/v*/x", "/api/v1/x", True),
        ("/api/v*/x", "/api/v1/y/x", True),
        ("/img*.png", "/img1.png", True),
        ("/*.png", "/a/b.png", True),
        ("*", "/", None),
        ("/users/{id}", "/users/42", True),
        ("/users/{id}", "/users/", False),
        ("/users/{id}", "/users/42/posts", False),
        ("/users/{id}/posts/{post}", "/users/1/posts/2", True),
        ("/users/{id}/*", "/users/1/x", True),
        ("/users/{id}/*", "/users//x", False),
        ("/*/{id}", "/a/b/c", True),
        ("/{a}*", "/ab", None),
        ("/a*a", "/a", False),
        ("/a*a", "/aa", True),
        ("/a*b*c", "/axbxc", True),
        ("/**", "/x", True),
    ],
)
def test_patterns(endpoint: str, path: str, expected: bool | None) -> None:
    from tidegate.errors import PolicyError

    if expected is None:
        with pytest.raises(PolicyError):
            Rule.make(endpoint, ["1/s"])
        return
    assert matches(endpoint, path) == expected
    assert (tier_of(Rule.make(endpoint, ["1/s"])).match("GET", path) is not None) == expected


def test_the_more_specific_answers() -> None:
    """From the least to the most preferred; each beats all before it."""
    ladder = [
        Rule.make("/*", ["1/s"]),
        Rule.make("/api/*", ["1/s"]),
        Rule.make("/api/users/*", ["1/s"]),
        Rule.make("/api/{kind}/{id}", ["1/s"]),
        Rule.make("/api/users/{id}", ["1/s"]),
        Rule.make("/api/users/42", ["1/s"]),
        Rule.make("/api/users/42", ["1/s"], ["GET"]),
        Rule.make("/api/*", ["1/s"], priority=1, name="first by priority"),
        Rule.make("/*", ["1/s"], priority=2, name="second by priority"),
    ]
    for count in range(1, len(ladder) + 1):
        for rules in (ladder[:count], ladder[:count][::-1]):
            found = tier_of(*rules).match("GET", "/api/users/42")
            assert found is not None
            assert found.rule is ladder[count - 1]


def test_methods_and_shadows() -> None:
    tier = tier_of(
        Rule.make("/x", ["1/s"], ["GET", "head"]),
        Rule.make("/x", ["1/s"], mode="shadow"),
        Rule.make("/*", ["1/s"], mode="shadow", methods=["POST"]),
    )
    assert tier.match("HEAD", "/x") is not None
    assert tier.match("POST", "/x") is None
    assert {each.rule.name for each in tier.shadow_rules("POST", "/x")} == {"/x shadow", "POST /* shadow"}
    assert {each.rule.name for each in tier.shadow_rules("GET", "/x")} == {"/x shadow"}
    assert tier_of(Rule.make("/x", ["1/s"])).shadow_rules("GET", "/x") == ()


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_head_is_counted_under_get(mode: str) -> None:
    def found(tier: CompiledTier, path: str) -> set[str]:
        rule = tier.match("HEAD", path)
        return {each.rule.name for each in (*tier.shadow_rules("HEAD", path), *([] if rule is None else [rule]))}

    rules = [
        Rule.make("/x", ["1/s"], ["GET"], mode=mode, name="get"),
        Rule.make("/a/*/c", ["1/s"], ["GET", "POST"], mode=mode, name="star"),
        Rule.make("/{id}/b", ["1/s"], ["GET"], mode=mode, name="segments"),
        Rule.make("/post", ["1/s"], ["POST"], mode=mode, name="post"),
    ]
    tier = tier_of(*rules)
    assert found(tier, "/x") == {"get"}
    assert found(tier, "/a/b/c") == {"star"}
    assert found(tier, "/7/b") == {"segments"}
    assert found(tier, "/post") == set()
    # A rule that names HEAD has it, whatever its place and priority, and only for its own endpoint and mode.
    named = Rule.make("/x", ["1/s"], ["HEAD"], mode=mode, priority=-1, name="head")
    assert found(tier_of(*rules, named), "/x") == {"head"}
    assert found(tier_of(*rules, named), "/7/b") == {"segments"}
    other_mode = Rule.make("/x", ["1/s"], ["HEAD"], mode="shadow" if mode == "enforce" else "enforce", name="other")
    assert found(tier_of(*rules, other_mode), "/x") == {"get", "other"}


pieces = st.sampled_from(["a", "b", "ab", "{id}", "*", "a*", "*b", "a*b", "v1"])
endpoints = st.lists(pieces, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
paths = st.lists(st.sampled_from(["a", "b", "ab", "aab", "v1", "x", ""]), min_size=1, max_size=5).map(
    lambda parts: "/" + "/".join(parts)
)


@given(
    rules=st.lists(
        st.tuples(
            endpoints, st.sampled_from([[], ["GET"], ["POST", "GET"]]), st.integers(0, 2), st.sampled_from(["enforce", "shadow"])
        ),
        min_size=1,
        max_size=30,
    ),
    path=paths,
    method=st.sampled_from(["GET", "POST"]),
)
def test_index_finds_what_a_scan_finds(rules: list[tuple[str, list[str], int, str]], path: str, method: str) -> None:
    made = [
        Rule.make(endpoint, ["1/s"], methods, priority=priority, mode=mode, name=f"r{number}")
        for number, (endpoint, methods, priority, mode) in enumerate(rules)
    ]
    tier = tier_of(*made)
    found = tier.match(method, path)
    fitting = [rule for rule in made if matches(rule.endpoint, path) and (not rule.methods or method in rule.methods)]
    enforcing = [rule for rule in fitting if rule.mode == "enforce"]
    assert (found is None) == (not enforcing)
    if found is not None:
        # Of all that fit, none is preferred to the one found.
        alone = [
            tier_of(*made_first).match(method, path)
            for made_first in ([rule, found.rule] for rule in enforcing if rule is not found.rule)
        ]
        assert found.rule in enforcing
        assert all(winner is not None and winner.rule.priority <= found.rule.priority for winner in alone)
    assert {each.rule.name for each in tier.shadow_rules(method, path)} == {
        rule.name for rule in fitting if rule.mode == "shadow"
    }


def test_a_thousand_rules_are_all_found() -> None:
    rules = [Rule.make(f"/api/v1/{{tenant}}/resource{number}", [f"{number + 1}/s"]) for number in range(500)]
    rules += [Rule.make(f"/files/*/kind{number}", [f"{number + 1}/s"]) for number in range(500)]
    tier = tier_of(*rules)
    for number in range(500):
        for path in (f"/api/v1/acme/resource{number}", f"/files/a/b/kind{number}"):
            found = tier.match("GET", path)
            assert found is not None
            assert found.limits.limits[0].amount == number + 1


def test_overrides_change_limits_and_keep_the_counter() -> None:
    tier = Tier.make("t", [Rule.make("/x", ["5/minute"])], ["50/day"])
    own = CompiledTier(tier, [Override("/x", (Limit.parse("9/minute"),)), Override("", (Limit.parse("90/day"),))])
    plain = CompiledTier(tier)
    for compiled, rule_amount, tier_amount in ((plain, 5, 50), (own, 9, 90)):
        found = compiled.match("GET", "/x")
        assert found is not None
        assert found.limits.limits[0].amount == rule_amount
        assert compiled.limits is not None
        assert compiled.limits.limits[0].amount == tier_amount
        assert found.limits.name == "t:/x"
        assert found.limits.quotas.endswith(f'"tier {tier_amount}/day";q={tier_amount};w=86400')


def test_subjects_of_different_kinds_never_meet() -> None:
    assert subject_of(Subject.API_KEY, "k:abc", "1.2.3.4", "free") == "k:abc"
    assert subject_of(Subject.IP, "k:abc", "1.2.3.4", "free") == "i:1.2.3.4"
    assert subject_of(Subject.IP, "k:abc", None, "free") is None
    assert subject_of(Subject.TIER, "k:abc", None, "free") == "t:free"
