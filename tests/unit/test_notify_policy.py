"""`[[notify]]` in a policy file: what is accepted, what is refused and with which message, and that secrets never get in."""

from __future__ import annotations

import pytest

from tidegate.errors import PolicyError
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.matching import CompiledTier
from tidegate.policy.notify import EventType, NotifyTarget, percents_of, require_secrets, secret_of, target_of
from tidegate.policy.periods import PeriodAnchor
from tidegate.policy.toml_reader import parse_policy
from tidegate.policy.toml_writer import policy_text

TIERS = '[[tiers]]\nname = "pro"\nlimits = ["100/minute"]\n'
WHOLE = """\
[[notify]]
at = [100, 80]
url = "https://example.com/hooks"
secret = "env:HOOK"
events = ["threshold", "key_expired", "key_revoked", "blocked"]
tiers = ["pro"]
rules = ["naïve 😀 \\u007f"]
min_window_s = 3600
"""


def _read(text: str) -> tuple[NotifyTarget, ...]:
    return parse_policy(TIERS + text).notify


def test_a_policy_with_notify_is_read_written_and_stored() -> None:
    policy = parse_policy(TIERS + WHOLE + '[[notify]]\nat = [80]\nurl = "http://10.0.0.1/"\nsecret = "env:OTHER"\n')
    whole, short = policy.notify
    assert whole == NotifyTarget(
        "https://example.com/hooks", "env:HOOK", (80, 100), tuple(EventType), ("pro",), ("naïve 😀 \x7f",), 3600
    )
    assert short == NotifyTarget("http://10.0.0.1/", "env:OTHER", (80,))
    assert parse_policy(policy_text(policy)).notify == policy.notify
    assert [target_of(target.fields) for target in policy.notify] == [whole, short]
    assert policy.caller_policy.notify == policy.notify


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("at = [0]", "at has 0, which is not a whole percentage from 1 to 100"),
        ("at = [101]", "at has 101, which"),
        ("at = [80.5]", "at has 80.5, which"),
        ("at = [true]", "at has True, which"),
        ("at = [80, 80]", "at has 80 twice"),
        ("at = 80", "at 80 must be a list of percentages"),
        ("at = []", "at names no percentage"),
        ('events = ["blocked"]\nat = [80]', "at is for the event 'threshold'"),
        (
            'at = [80]\nevents = ["blocke"]',
            "events 'blocke' is not known: use one of threshold, key_expired, key_revoked, blocked",
        ),
        ("at = [80]\nevents = []", "events [] must be a list of threshold"),
        ("at = [80]\ntiers = [1]", "tiers has 1, which is not a name"),
        ('at = [80]\nrules = "a"', "rules 'a' must be a list"),
        ("at = [80]\nmin_window_s = 0", "min_window_s 0 must be a whole number of seconds from 1 to"),
        ('at = [80]\ncolour = "red"', "unknown field 'colour'"),
    ],
)
def test_mistakes_name_the_value_and_the_line(lines: str, reason: str) -> None:
    with pytest.raises(PolicyError) as refused:
        _read(f'[[notify]]\nurl = "https://example.com"\nsecret = "env:A"\n{lines}\n')
    assert reason in refused.value.reason
    assert refused.value.line is not None
    assert refused.value.line >= 4


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.com", "must be an https:// or http:// URL"),
        ("file:///etc/passwd", "must be an https:// or http:// URL"),
        ("example.com", "must be an https:// or http:// URL"),
        ("https://user:word@example.com", "must not contain a user name or password"),
        ("https://example.com/#part", "has a fragment"),
        ("https://example.com/ä", "printable ASCII"),
        ("https://example.com:99999/", "not a valid URL"),
        ("https://example.com/" + "a" * 1000, "1 to 1000 printable ASCII"),
    ],
)
def test_urls_that_are_refused(url: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        NotifyTarget.make(url, "env:A", [80])


def test_a_secret_is_named_and_never_written_into_a_policy() -> None:
    for secret in ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "env:", "env:1A", 5, "env:A B"):
        with pytest.raises(PolicyError, match="secret is not a reference: name the environment variable") as refused:
            NotifyTarget.make("https://example.com", secret, [80])
        assert "whsec_M" not in str(refused.value)
    with pytest.raises(PolicyError, match="has the secrets 'env:A' and 'env:B'"):
        _read("".join(f'[[notify]]\nurl = "https://a.example"\nsecret = "env:{name}"\nat = [80]\n' for name in "AB"))


def test_the_key_of_a_secret() -> None:
    assert secret_of("env:A", {"A": "whsec_" + "AAECAwQFBgcICQoLDA0ODw=="}) == bytes(range(16))
    assert secret_of("env:A", {"A": "a text of more than 16 bytes"}) == b"a text of more than 16 bytes"
    for value, reason in (
        ("", "the environment variable A is not set"),
        ("short", "has 5 bytes: at least 16 are needed"),
        ("whsec_$$$", "is not base64"),
    ):
        with pytest.raises(PolicyError, match=reason) as refused:
            secret_of("env:A", {"A": value})
        assert not value or f"{value!r}" not in str(refused.value)
    with pytest.raises(PolicyError, match="TIDEGATE_NOT_SET is not set"):
        require_secrets([NotifyTarget.make("https://example.com", "env:TIDEGATE_NOT_SET", [80])])


def test_which_limits_notify() -> None:
    text = (
        '[[tiers]]\nname = "pro"\nlimits = ["1000/day"]\nquotas = ["5000/month"]\n'
        '[[tiers.rules]]\nendpoint = "/a"\nname = "a"\nlimits = ["10/second", "100/minute"]\n'
        '[[tiers.rules]]\nendpoint = "/b"\nname = "b"\nalgorithm = "leaky_bucket"\nlimits = ["100/minute"]\n'
        '[[tiers.rules]]\nendpoint = "/c"\nname = "c"\nmode = "shadow"\nlimits = ["100/minute"]\nquotas = ["9/day"]\n'
    )
    compiled = CompiledTier(parse_policy(text).tiers[0])
    assert compiled.limits is not None
    assert compiled.quotas is not None
    sets = [each for rule in compiled.rules for each, _ in rule.counters("")]
    sets += [compiled.limits, compiled.quotas.of(PeriodAnchor())]

    def watched(*targets: NotifyTarget) -> set[str]:
        return {limit.text for each in sets for limit in each.limits if percents_of(targets, each, limit)}

    def target(**fields: object) -> NotifyTarget:
        return NotifyTarget.make("https://example.com", "env:A", [80], **fields)

    assert watched(target()) == {"100/minute", "1000/day", "5000/month"}
    assert watched(target(min_window_s=1)) == {"10/second", "100/minute", "1000/day", "5000/month"}
    assert watched(target(rules=["a"], tiers=["pro"])) == {"100/minute"}
    assert watched(target(tiers=["free"])) == watched() == set()
    assert watched(target(events=["threshold"], min_window_s=86_400)) == {"1000/day", "5000/month"}
    own = LimitSet("emails", Algorithm.FIXED_WINDOW, [Limit.parse("100/minute")], rule="emails")
    assert percents_of([target()], own, own.limits[0]) == (), "limits of no tier"
