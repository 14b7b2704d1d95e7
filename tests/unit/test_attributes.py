"""Attributes in a policy: how they are written, what is refused, and which of several rules answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases.attributes import POLICY
from tidegate.errors import BadRequest, PolicyError
from tidegate.policy.attributes import CallerRules, OnMissing, checked_attributes
from tidegate.policy.globs import Glob
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import Tier
from tidegate.policy.rules import Rule, Subject
from tidegate.policy.toml_reader import parse_policy, policy_warnings
from tidegate.policy.toml_writer import policy_text


def test_attributes_are_read_and_written() -> None:
    policy = parse_policy(POLICY)
    assert [(source.name, source.text) for source in policy.attributes] == [
        ("user", "header:x-user-id"),
        ("plan", "header:x-plan"),
        ("team", "jwt:team"),
    ]
    assert policy.callers == CallerRules("plan", "public")
    by_user, both, pathless = policy.tiers[1].rules
    assert (by_user.subject, by_user.subject_value, by_user.on_missing) == (Subject.ATTRIBUTES, "user", OnMissing.DENY)
    assert (both.subject_value, both.match) == (["org", "user"], (("plan", "pro"), ("region", "eu-*")))
    assert both.name == "POST /api/* plan=pro&region=eu-* shadow"
    assert pathless.endpoint == "descriptor:service=pay&user=*", "a match without an endpoint is a descriptor"
    assert parse_policy(policy_text(policy)) == policy
    assert policy_warnings(policy) == []


def test_a_list_of_one_subject_is_that_subject() -> None:
    assert Rule.make("/x", ["1/s"], subject=["ip"]) == Rule.make("/x", ["1/s"], subject="ip")
    assert Rule.make("/x", ["1/s"], subject=["user"]) == Rule.make("/x", ["1/s"], subject="user")


RULE = '[[tiers]]\nname = "t"\n[[tiers.rules]]\nendpoint = "/x"\nlimits = ["1/day"]\n'


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ('[attributes]\nUser = "header:X-User"\n', "'User' must have 1 to 32 of lower-case letters", 2),
        ('[attributes]\nip = "header:X-User"\n', "'ip' has the name of a subject", 2),
        ('[attributes]\nuser = "cookie:session"\n', "'cookie:session', which is not a header", 2),
        ('[attributes]\nuser = "header:X User"\n', "'header:X User', which is not a header", 2),
        ('[attributes]\nuser = "header:Authorization"\n', "carries a credential", 2),
        ("[attributes]\nuser = 7\n", "has the source 7", 2),
        ('[attributes]\norg = "jwt:org_id"\n', "from a bearer token ('jwt:org_id'), but the policy has no [jwt]", 2),
        ("attributes = 3\n", 'write [attributes] and user = "header:X-User-Id"', 1),
        ("[attributes]\n" + "".join(f'a{number} = "header:X"\n' for number in range(65)), "65 attributes: at most 64", 1),
        ("[callers]\n", "names neither tier_from nor default_tier", 1),
        ('[callers]\ntier = "t"\n', "unknown field 'tier'", 2),
        ('[callers]\ntier_from = "X-Plan"\n', "'X-Plan' must have", 2),
        ('[callers]\ndefault_tier = "tt"\n', "tier 'tt' is not in this policy: did you mean 't'?", 2),
        (RULE + 'subject = ["user", "tier"]\n', "leave it out", 6),
        (RULE + 'subject = ["user", "user"]\n', "names one twice", 6),
        (RULE + "subject = []\n", "subject has 0 names", 6),
        (RULE + "subject = 3\n", 'write "user"', 6),
        (RULE + "subject = [" + ", ".join(f'"a{number}"' for number in range(9)) + "]\n", "9 names: it takes 1 to 8", 6),
        (RULE + 'subject = "attributes!"\n', "the name of an attribute", 6),
        (RULE + 'on_missing = "skip"\n', "on_missing 'skip' is for a subject with an attribute", 6),
        (RULE + 'subject = "user"\non_missing = "no"\n', "use one of ip, skip, deny", 7),
        (RULE + 'match = "plan"\n', 'write match = { plan = "pro" }', 6),
        (RULE + "match = { plan = 1 }\n", "value 1 for 'plan'", 6),
        (RULE + 'match = { plan = "" }\n', "must be 1 to 256 printable characters", 6),
        (RULE + 'match = { Plan = "x" }\n', "match is of attributes: attribute 'Plan' must have", 6),
        (RULE + "match = { " + ", ".join(f'a{number} = "x"' for number in range(17)) + " }\n", "17 entries", 6),
        (
            RULE.replace('endpoint = "/x"', 'descriptor = { a = "b" }') + 'match = { a = "b" }\n',
            "not for a rule with a descriptor",
            6,
        ),
        (RULE.replace('endpoint = "/x"\n', "") + "match = {}\n", "0 entries", 5),
        (RULE.replace('endpoint = "/x"\n', ""), "'endpoint' is missing", 3),
    ],
)
def test_what_is_refused_in_a_policy(text: str, said: str, line: int) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_policy(text if "[[tiers]]" in text else text + '[[tiers]]\nname = "t"\n', "p.toml")
    assert said in refused.value.reason
    assert refused.value.line == line


def test_attributes_of_a_check() -> None:
    assert checked_attributes({"user": "4:2/\0😀", "org": "", "plan": None}) == {"user": "4:2/\0😀"}
    assert checked_attributes({"user": "é" * 256})["user"] == "é" * 256
    for given_, said in (
        ({"user": "x" * 257}, "257 characters"),
        ({f"a{number}": "x" for number in range(17)}, "17 attributes: send at most 16"),
        ({"User": "x"}, "'User' must have 1 to 32"),
        ({"a" * 33: "x"}, "must have 1 to 32"),
        ({"x\n": "x"}, "must have 1 to 32"),
        ({"ip": "x"}, "the name of a field of the check"),
        ({"user": 42}, "send it as a string"),
    ):
        with pytest.raises(BadRequest, match=said):
            checked_attributes(given_)  # type: ignore[arg-type]


def answer(rules: list[Rule], method: str = "GET", path: str = "/a/b", **attributes: str) -> str | None:
    found = CompiledTier(Tier.make("t", rules)).match(method, path, attributes)
    return None if found is None else found.rule.name


def rule(name: str, endpoint: str = "/a/*", **fields: object) -> Rule:
    return Rule.make(endpoint, ["1/s"], name=name, **fields)  # type: ignore[arg-type]


def test_which_rule_answers() -> None:
    plain, one = rule("plain"), rule("one", match={"plan": "pro"})
    any_, two = rule("any", match={"plan": "*"}), rule("two", match={"plan": "*", "user": "*"})
    rules = [plain, any_, one, two]
    assert answer(rules) == "plain", "rules with a match are not for checks without attributes"
    assert answer(rules, user="1") == "plain"
    assert answer(rules, plan="free") == "any"
    assert answer(rules, plan="pro") == "one", "fewer '*' first"
    assert answer(rules, plan="pro", user="1") == "two", "more entries first"
    assert answer([*rules, rule("first", priority=1)], plan="pro") == "first", "priority before all"
    assert answer([*rules, rule("literal", "/a/b")], plan="pro") == "literal", "the endpoint before the match"
    assert answer([rule("one", match={"plan": "pro"}), rule("again", match={"plan": "pr*o"})], plan="pro") == "one"
    assert answer([rule("a", match={"plan": "pro"}), rule("b", match={"user": "1"})], plan="pro", user="1") == "a", (
        "then the earlier"
    )
    assert answer([plain, rule("post", methods=["POST"], match={"plan": "pro"})], plan="pro") == "plain"
    assert answer([plain, rule("post", methods=["POST"], match={"plan": "pro"})], "POST", plan="pro") == "post"
    assert answer([rule("elsewhere", "/b", match={"plan": "pro"})], plan="pro") is None


def test_a_rule_whose_subject_is_missing_is_skipped() -> None:
    rules = [rule("both", subject=["org", "user"], on_missing="skip", priority=2), rule("plain")]
    assert answer(rules, user="1") == "plain"
    assert answer(rules, user="1", org="2") == "both"
    tier = CompiledTier(Tier.make("t", [rule("watched", subject="user", on_missing="skip", mode="shadow")]))
    assert tier.shadow_rules("GET", "/a/b", {"org": "1"}) == ()
    assert len(tier.shadow_rules("GET", "/a/b", {"user": "1"})) == 1


def test_rules_that_never_answer_are_warned_about() -> None:
    tier = """
[[tiers]]
name = "t"
  [[tiers.rules]]
  endpoint = "/a/*"
  limits = ["1/s"]
  priority = {priority}
  match = {{ plan = "{wide}" }}
  name = "wide"
  [[tiers.rules]]
  endpoint = "/a/b"
  limits = ["1/s"]
  match = {{ plan = "{narrow}", user = "1" }}
  name = "narrow"
"""

    def warned(priority: int, wide: str, narrow: str) -> bool:
        return bool(policy_warnings(parse_policy(tier.format(priority=priority, wide=wide, narrow=narrow))))

    assert warned(1, "pro*", "pro-1")
    assert warned(1, "p*", "pro-*")
    assert not warned(0, "pro*", "pro-1")
    assert not warned(1, "pro", "pro-1")
    assert not warned(1, "{a}*", "{b}*"), "braces mean nothing here"


_names = st.sampled_from(["plan", "user", "org"])
_patterns = st.sampled_from(["a", "b", "*", "a*", "*b", "a*b", "*a*", "ab"])
_matches = st.dictionaries(_names, _patterns, max_size=3)


@given(
    st.lists(st.tuples(st.sampled_from(["/a/*", "/a/b", "/{x}/b", "/*"]), _matches, st.integers(0, 1)), max_size=8),
    st.dictionaries(_names, st.sampled_from(["a", "b", "ab", "aab", "c"]), max_size=3),
)
def test_the_index_finds_what_going_through_all_rules_finds(
    made: list[tuple[str, dict[str, str], int]], attributes: dict[str, str]
) -> None:
    """All endpoints here match the path, so only attributes and the order decide."""
    rules = [
        rule(str(number), endpoint, match=match, priority=priority) for number, (endpoint, match, priority) in enumerate(made)
    ]
    endpoints = ["/a/b", "/{x}/b", "/a/*", "/*"]
    holding = [
        (
            -each.priority,
            endpoints.index(each.endpoint),
            -len(match),
            sum(p.count("*") for p in match.values()),
            number,
            each.name,
        )
        for number, (each, (_, match, _)) in enumerate(zip(rules, made, strict=True))
        if all(name in attributes and Glob(pattern).matches(attributes[name]) for name, pattern in match.items())
    ]
    assert answer(rules, **attributes) == (min(holding)[-1] if holding else None)


def test_the_policies_of_the_documentation_are_valid() -> None:
    page = (Path(__file__).parents[2] / "docs" / "callers.md").read_text()
    policies = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(policies) == 7
    for text in policies:
        policy = parse_policy(text)
        assert policy.attributes or policy.namespaces or policy.tiers[0].overrides
        assert policy_warnings(policy) == []
