"""The policy file: what is read, and what is refused at which line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cpu_time import TRIES, assert_cpu_below, assert_growth_below, cpu_s
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.errors import PolicyError
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.limits import Algorithm, OnFailure
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import KeyStatus
from tidegate.policy.rules import Mode, Subject
from tidegate.policy.toml_lines import LineIndex, line_of_deep_key
from tidegate.policy.toml_reader import load_policy, parse_policy, policy_warnings
from tidegate.policy.toml_writer import policy_text
from tidegate.timestamps import MAX_US, MIN_US, format_timestamp, parse_timestamp

WHOLE = """\
# every field there is
[[tiers]]
name = "free"
limits = ["20000/day"]

  [[tiers.rules]]
  endpoint = "/api/v1/*"
  methods = ["GET", "post"]
  algorithm = "token_bucket"
  limits = ["100/minute burst 20"]
  subject = "ip"
  priority = 10
  mode = "shadow"
  on_failure = "deny"
  name = "reads"

  [[tiers.rules]]
  endpoint = "/x"
  limits = ["5/s"]

[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
name = "demo"
status = "revoked"
expires_at = 2030-01-02T03:04:05+01:00
limits = ["90000/day"]
  [[api_keys.overrides]]
  rule = "/x"
  limits = ["50/s"]

[[api_keys]]
sha256 = "ABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABAB"
tier = "free"
expires_at = 2030-01-02

[anonymous]
tier = "free"
"""


def test_every_field() -> None:
    policy = parse_policy(WHOLE)
    (tier,) = policy.tiers
    first, second = tier.rules
    assert (tier.name, [limit.text for limit in tier.limits], tier.managed_by_file) == ("free", ["20000/day"], True)
    assert (first.endpoint, first.methods, first.algorithm) == ("/api/v1/*", ("GET", "POST"), Algorithm.TOKEN_BUCKET)
    assert (first.subject, first.priority, first.mode) == (Subject.IP, 10, Mode.SHADOW)
    assert (first.on_failure, first.name, first.limits[0].burst) == (OnFailure.DENY, "reads", 20)
    assert (second.algorithm, second.subject, second.mode, second.name) == (
        Algorithm.SLIDING_WINDOW,
        Subject.API_KEY,
        Mode.ENFORCE,
        "/x",
    )
    demo, other = policy.api_keys
    assert (demo.sha256, demo.tier, demo.status) == (hash_api_key("demo-free-key-0001"), "free", KeyStatus.REVOKED)
    assert demo.expires_at_us == 1_893_549_845_000_000
    assert [(each.rule, each.limits[0].text) for each in demo.overrides] == [("", "90000/day"), ("/x", "50/second")]
    assert (other.sha256, other.expires_at_us) == ("ab" * 32, 1_893_542_400_000_000)
    assert policy.anonymous_tier == "free"


REFUSED: dict[str, tuple[str, str, int, str]] = {
    # what: replaced, by, line, said
    "TOML syntax": ('name = "free"', 'name = "free', 3, "not TOML"),
    "unknown section": ("[anonymous]", "[anonymus]", 37, "did you mean 'anonymous'"),
    "unknown field of a tier": ("limits = [", "limit = [", 4, "did you mean 'limits'"),
    "unknown field of a rule": ('mode = "shadow"', 'mod = "shadow"', 13, "did you mean 'mode'"),
    "unit": ('["5/s"]', '["5/fortnight"]', 19, "'fortnight'"),
    "limits as a text": ('["5/s"]', '"5/s"', 19, "must be a list"),
    "limit of another type": ('["5/s"]', "[5]", 19, "5"),
    "burst in a window": ('["20000/day"]', '["20000/day burst 5"]', 4, "burst"),
    "same window twice": ('["5/s"]', '["5/s", "6/1s"]', 19, "same window"),
    "algorithm": ('"token_bucket"', '"gcra"', 9, "'gcra'"),
    "subject": ('subject = "ip"', 'subject = "User"', 11, "'User'"),
    "priority": ("priority = 10", 'priority = "high"', 12, "'high'"),
    "mode": ('mode = "shadow"', 'mode = "dry"', 13, "'dry'"),
    "on_failure": ('on_failure = "deny"', 'on_failure = "open"', 14, "'open'"),
    "method": ('"post"', '"po st"', 8, "'po st'"),
    "methods as a text": ('["GET", "post"]', '"GET"', 8, "list"),
    "no methods": ('["GET", "post"]', "[]", 8, "leave it out"),
    "endpoint": ('endpoint = "/x"', 'endpoint = "x"', 18, "'/'"),
    "empty name": ('name = "reads"', 'name = ""', 15, "non-empty"),
    "tier name": ('name = "free"', 'name = "f r"', 3, "'f r'"),
    "missing endpoint": ('  endpoint = "/x"\n', "", 17, "'endpoint' is missing"),
    "two rules of one name": ('endpoint = "/x"', 'endpoint = "/x"\n  name = "reads"', 17, "two rules"),
    "key and digest": ('key = "demo-free-key-0001"', f'key = "demo-free-key-0001"\nsha256 = "{"ab" * 32}"', 22, "exactly one"),
    "short key": ("demo-free-key-0001", "short", 22, "16 to 512"),
    "mistyped key": ("demo-free-key-0001", "tg_" + "a" * 38, 22, "check characters"),
    "digest": ("ABABABABAB", "xyz", 33, "64 hex"),
    "key twice": ("sha256 = ", f'sha256 = "{hash_api_key("demo-free-key-0001")}" #', 32, "stands twice"),
    "tier of a key": ('tier = "free"\nname', 'tier = "fre"\nname', 23, "did you mean 'free'"),
    "status": ('"revoked"', '"gone"', 25, "active or revoked"),
    "expiry without offset": ("+01:00", "", 26, "has no offset"),
    "expiry beyond the years": ("2030-01-02T03:04:05+01:00", "9999-12-31T23:00:00-01:00", 26, "years 1 to 9999"),
    "expiry before the years": ("2030-01-02T03:04:05+01:00", "0001-01-01T00:00:00+00:01", 26, "years 1 to 9999"),
    "name with a NUL": ('name = "demo"', 'name = "de\\u0000mo"', 24, "U+0000"),
    "endpoint too long for a name": ('endpoint = "/x"', f'endpoint = "/{"x" * 300}"', 18, "needs a 'name'"),
    "expiry as a text": ("2030-01-02\n", '"2030-01-02"\n', 35, "without quotes"),
    "rule of an override": ('rule = "/x"', 'rule = "/y"', 29, "no rule '/y'"),
    "rule of an override by ip": ('rule = "/x"', 'rule = "reads"', 29, "counts by ip"),
    "limits of an override": ('["50/s"]', '["50/s burst 3"]', 30, "burst"),
    "anonymous tier": ('[anonymous]\ntier = "free"', '[anonymous]\ntier = "none"', 38, "'none'"),
    "anonymous as a text": ('[anonymous]\ntier = "free"', "", 1, ""),
}


@pytest.mark.parametrize("what", [name for name in REFUSED if REFUSED[name][3]])
def test_rejected_with_file_line_and_reason(what: str) -> None:
    replaced, by, line, said = REFUSED[what]
    text = WHOLE.replace(replaced, by, 1) if what != "anonymous tier" else WHOLE.replace(replaced, by)
    assert text != WHOLE
    with pytest.raises(PolicyError) as refused:
        parse_policy(text, "policy.toml")
    assert refused.value.line == line, refused.value.message
    assert said in refused.value.reason
    assert refused.value.message.startswith(f"policy.toml:{line}: ")
    assert "demo-free-key-0001" not in refused.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no tiers"),
        ("tiers = 5", "[[tiers]]"),
        ('tiers = ["a"]', "[[tiers]]"),
        ('anonymous = "free"\n[[tiers]]\nname="free"', "[anonymous]"),
        ('[[tiers]]\nname = "a"\nrules = 1', "[[tiers.rules]]"),
        ('[[tiers]]\nname = "a"\n[[tiers]]\nname = "a"', "stands twice"),
        ("x = " + "[" * 3000, "not TOML"),
    ],
)
def test_rejected_as_a_whole(text: str, said: str) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_policy(text, "p")
    assert said in refused.value.reason
    assert refused.value.line is not None


def test_times_are_exact_to_the_end_of_time() -> None:
    text = WHOLE.replace("2030-01-02T03:04:05+01:00", "9999-12-31T23:59:59.999999Z")
    assert parse_policy(text).api_keys[0].expires_at_us == MAX_US
    assert format_timestamp(MAX_US) == format_timestamp(MAX_US + 1) == "9999-12-31T23:59:59.999999Z"
    assert format_timestamp(MIN_US) == format_timestamp(MIN_US - 1) == "0001-01-01T00:00:00Z"
    for at_us in (MIN_US, MAX_US, -1, 0, 1_893_549_845_000_001):
        assert parse_timestamp(str(format_timestamp(at_us)), "expires_at") == at_us


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="not there"):
        load_policy(tmp_path / "absent.toml")
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b'x = 1\ny = "\xff"\n')
    with pytest.raises(PolicyError, match=r"binary\.toml:2: .*UTF-8"):
        load_policy(binary)
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * 10_000_001)
    with pytest.raises(PolicyError, match="more than 10000000 bytes"):
        load_policy(large)
    windows = tmp_path / "windows.toml"
    windows.write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())
    assert load_policy(windows) == parse_policy(WHOLE)


TRICKY = '''\
a = """
b = 1
"""  # comment with [brackets] and "quotes
'quoted key' = [
  "x = 1",  # [[y]]
  { z = 2 },
]
c.d."e f" = 'it''s'
[t.u]
v = \'\'\'
[[no]]
\'\'\'
[[w]]
x = 1
[[w.y]]
[w.y.z]
q = 1
[[w]]
x = 2
[[w.y]]
[[w.y]]
r = [[1, 2], [3]]
'''


def test_lines_of_tricky_toml() -> None:
    index = LineIndex(TRICKY.replace("'it''s'", "'it s'"))
    for path, line in {
        ("a",): 1,
        ("quoted key",): 4,
        ("quoted key", 1, "z"): 4,
        ("c", "d", "e f"): 8,
        ("t", "u"): 9,
        ("t", "u", "v"): 10,
        ("w", 0): 13,
        ("w", 0, "x"): 14,
        ("w", 0, "y", 0): 15,
        ("w", 0, "y", 0, "z", "q"): 17,
        ("w", 1): 18,
        ("w", 1, "x"): 19,
        ("w", 1, "y", 1, "r"): 22,
        ("nothing", "there"): 1,
    }.items():
        assert index.line(path) == line, path


@given(st.text(max_size=80) | st.text("[]{}='\"#\n ab.,1\\", max_size=60))
def test_any_text_is_read_or_rejected(text: str) -> None:
    LineIndex(text)
    with pytest.raises(PolicyError):
        parse_policy(text)


def warned(tier: str) -> list[str]:
    return policy_warnings(parse_policy(f'[[tiers]]\nname = "t"\n{tier}\n'))


RULE = "[[tiers.rules]]\n"


@pytest.mark.parametrize("window", ["month", "year"])
def test_a_month_or_a_year_that_does_not_start_anew_is_warned_of(window: str) -> None:
    limits = f'limits = ["9/{window}"]\n'
    (own,) = warned(limits)
    assert f"'9/{window}' slides" in own
    (default,) = warned(f'{RULE}endpoint = "/a"\n{limits}')
    assert f"rule '/a': limit '9/{window}' slides" in default
    assert f'per {window} write quotas = ["9/{window}"]' in default
    assert f'per {window} write quotas = ["9/{window}"]' in own
    for algorithm, words in (("token_bucket", "refills"), ("leaky_bucket", "refills"), ("sliding_log", "over the last 3")):
        (bucket,) = warned(f'{RULE}endpoint = "/a"\nalgorithm = "{algorithm}"\n{limits}')
        assert words in bucket
    assert warned(f'{RULE}endpoint = "/a"\nalgorithm = "fixed_window"\n{limits}') == []
    assert warned(f'{RULE}endpoint = "/a"\nlimits = ["9/30d", "9/week"]') == []


def test_rules_that_escape_one_for_everything_are_warned_of() -> None:
    everything = f'{RULE}endpoint = "/*"\nlimits = ["100/minute"]\n'
    search = f'{RULE}endpoint = "/search"\nlimits = ["10/minute"]\n'
    (one,) = warned(everything + search)
    assert one == (
        "tier 't': rule '/*' does not count what '/search' answers: one rule answers a request; "
        "put what is to hold over all endpoints into the tier's own limits, or into its quotas where a plan sells it"
    )
    (many,) = warned(everything + "".join(search.replace("search", name) for name in "abcde"))
    assert "'/a', '/b', '/c' and 2 more answer" in many
    for quiet in (
        everything,
        search,
        'limits = ["1000/minute"]\n' + everything + search,
        'quotas = ["1000/month"]\n' + everything + search,
        everything + search + 'mode = "shadow"\n',
        everything + 'methods = ["GET"]\n' + search + 'methods = ["POST"]\n',
    ):
        assert warned(quiet) == []
    (never,) = warned(everything + search + "priority = -1\n")
    assert "'/search' never answers" in never


DEEP = ".".join("a" * 9)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"x = 1\n{DEEP} = 1", 2),
        (f"[{DEEP}]", 1),
        (f"[[{DEEP}]]", 1),
        (f"\n\"a\" . 'b' . {DEEP} = 1", 2),
        (f"x = {{ {DEEP} = 1 }}", 1),
        (f'x = """\n"""\n{DEEP} = 1', 3),
        (f'x = """a""""\n{DEEP} = 1', 2),
        (f'x = "\\""\n{DEEP} = 1', 2),
        ("a." * 8_000 + "a = 1", 1),
    ],
)
def test_a_key_of_many_parts_is_rejected_before_it_is_read(text: str, line: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PolicyError) as refused:
            parse_policy(text)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert "more than 8 parts" in refused.value.reason
    assert refused.value.line == line


@pytest.mark.parametrize(
    "text", [f'x = "{DEEP}"', f"x = '''\n{DEEP}'''", f"# {DEEP}", f'x = """{DEEP}"""', f'x = ["{DEEP}", 1.5]', f'x = """{DEEP}']
)
def test_dots_that_are_no_key_are_accepted(text: str) -> None:
    assert line_of_deep_key(text) is None


@pytest.mark.parametrize("piece", ['\\"', '"""a"\n\\', "'''", '"a".', "a.a.a.a.a.a.a,", "a ", ".", '"', '"\\\\\\', "#a"])
def test_looking_for_deep_keys_takes_time_in_proportion(piece: str) -> None:
    def cost_s(size: int) -> float:
        text = piece * (size // len(piece)) + "........."
        return cpu_s(lambda: line_of_deep_key(text))

    assert_growth_below(1_000, cost_s, 10_000, 1_000_000)  # 100 times as much, not 10,000


def _rules(count: int, **fields: str) -> str:
    more = "".join(f"{name} = {value}\n" for name, value in fields.items())
    return '[[tiers]]\nname = "t"\n' + "".join(
        f'[[tiers.rules]]\nendpoint = "/r{number}"\nlimits = ["1/s"]\n{more}' for number in range(count)
    )


def test_many_rules_take_time_in_proportion() -> None:
    def cost_s(count: int) -> float:
        text = _rules(count)
        return cpu_s(lambda: policy_warnings(parse_policy(text)))

    assert_growth_below(500, cost_s, 80, 8_000)  # 100 times as much; by pairs 10,000


def test_rules_of_one_endpoint_are_compared_with_a_bounded_number() -> None:
    rules = "".join(
        f'[[tiers.rules]]\nendpoint = "/a"\nlimits = ["1/s"]\nmethods = ["M{number}"]\nname = "r{number}"\n'
        for number in range(3_000)
    )
    policy = parse_policy(f'[[tiers]]\nname = "t"\n{rules}')
    assert policy_warnings(policy) == []


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        (_rules(10_001), "at most 10000 are taken", 30_003),
        (_rules(6_000) + _rules(6_000).replace('"t"', '"u"'), "more than 10000 rules", 30_005),
        ("".join(f'[[tiers]]\nname = "t{number}"\n' for number in range(1_001)), "at most 1000 are taken", 2_001),
        ('[[tiers]]\nname = "t"\nlimits = [' + '"1/s",' * 33 + "]", "a rule takes 1 to 16", 3),
        (_rules(1, methods="[" + '"GET",' * 33 + "]"), "at most 32 are read", 6),
        ("x = " + "9" * 5_000, "a number has too many digits", 1),
        ("[a." + "b" * 900_000 + "]\n[a." + "b" * 900_000 + "]", "not TOML", 2),
    ],
)
def test_policies_are_bounded(text: str, said: str, line: int) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_policy(text)
    assert said in refused.value.reason
    assert len(refused.value.reason) < 500
    assert refused.value.line == line


def test_an_unknown_name_is_compared_with_a_bounded_number_of_others() -> None:
    long = "ab" * 120
    names = "".join(f'[[tiers.rules]]\nendpoint = "/{long}{number:05}"\nlimits = ["1/s"]\n' for number in range(3_000))
    rule = "ba" * 120 + "00000"
    key = f'[[api_keys]]\nkey = "demo-free-key-0001"\ntier = "t"\n[[api_keys.overrides]]\nrule = "{rule}"\nlimits = []'
    plain = f'[[tiers]]\nname = "t"\n{names}'

    def refuse() -> None:
        with pytest.raises(PolicyError, match="has no rule"):
            parse_policy(plain + key)

    # Compared with every name, it is more than 100 times as much.
    assert_cpu_below(20 * min(cpu_s(lambda: parse_policy(plain)) for _ in range(TRIES)), refuse)


def test_warnings() -> None:
    policy = parse_policy(
        """
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/a"
  limits = ["100/minute", "10000000/day"]
  [[tiers.rules]]
  endpoint = "/a"
  limits = ["1/s"]
  methods = ["GET"]
  priority = -1
  [[tiers.rules]]
  endpoint = "/b"
  limits = ["100/minute", "5000/day"]
[[tiers]]
name = "idle"
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""
    )
    warnings = policy_warnings(policy)
    assert len(warnings) == 4
    assert any("'10000000/day' never binds" in warning for warning in warnings)
    assert any("'GET /a' never answers" in warning for warning in warnings)
    assert sum("'idle'" in warning for warning in warnings) == 2


async def test_policy_catalog() -> None:
    catalog = PolicyCatalog(parse_policy(WHOLE))
    assert (await catalog.tier("free"))[1] is not None
    assert (await catalog.tier("none"))[1] is None
    assert (await catalog.caller_policy())[1].anonymous_tier == "free"
    assert (await catalog.api_key("ab" * 32))[1] is not None
    before = await catalog.version()
    catalog.replace(parse_policy('[[tiers]]\nname = "b"'))
    assert await catalog.version() > before
    assert (await catalog.tier("free"))[1] is None
    await catalog.ping()
    await catalog.close()


def test_a_rule_may_not_be_leased() -> None:
    text = '[[tiers]]\nname = "a"\n[[tiers.rules]]\nendpoint = "/x"\nlimits = ["1/s"]\nleases = %s\n'
    rule = parse_policy(text % "false").tiers[0].rules[0]
    assert not rule.leases
    compiled = CompiledTier(parse_policy(text % "false").tiers[0]).rules[0].limits
    assert compiled is not None
    assert not compiled.leasable
    assert parse_policy(text % "true").tiers[0].rules[0].leases
    with pytest.raises(PolicyError, match="leases 'no' must be true or false"):
        parse_policy(text % '"no"')


SOLD = """[[tiers]]
name = "pro"
limits = ["50/second"]
quotas = ["5000/day", "100000/month"]
overage = { up_to = "20%" }

  [[tiers.rules]]
  endpoint = "/export"
  quotas = ["10/week"]
  overage = true
  name = "/export"

  [[tiers.rules]]
  endpoint = "/soft"
  limits = ["5/minute"]
  mode = "soft"
  name = "/soft soft"
"""


def test_quotas_are_written_as_they_are_read() -> None:
    policy = parse_policy(SOLD)
    (tier,) = policy.tiers
    assert [quota.text for quota in tier.quotas] == ["5000/day", "100000/month"]
    assert tier.overage is not None
    assert (tier.overage.most(100_000), tier.overage.value) == (120_000, {"up_to": "20%"})
    export, soft = tier.rules
    assert (export.limits, export.overage is not None and export.overage.value, soft.name) == ((), True, "/soft soft")
    assert parse_policy(policy_text(policy)) == policy
    assert policy_text(policy) == SOLD
    assert policy_warnings(policy) == []


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ('quotas = ["10/fortnight"]', 3, "unknown period 'fortnight'"),
        ("quotas = [10]", 3, 'quotas must be a list such as ["100000/month"]'),
        ('quotas = "10/month"', 3, 'quotas must be a list such as ["100000/month"]'),
        ('quotas = ["1/month", "2/month"]', 3, "are for the same period"),
        ("overage = true", 3, "overage is for quotas"),
        ('quotas = ["1/month"]\noverage = { up_to = "20" }', 4, "must be a whole percentage"),
        ('quotas = ["1/month"]\noverage = "20%"', 4, "is not understood: write true"),
        ("quotas = [" + '"1/day", ' * 99 + "]", 3, "quotas has 99 entries"),
    ],
)
def test_quotas_that_are_refused_name_their_line(text: str, line: int, why: str) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_policy(f'[[tiers]]\nname = "t"\n{text}\n')
    assert (why in refused.value.reason, refused.value.line) == (True, line), refused.value
    if "overage = true" not in text:
        with pytest.raises(PolicyError) as refused:
            parse_policy(f'[[tiers]]\nname = "t"\n[[tiers.rules]]\nendpoint = "/a"\n{text}\n')
        assert why in refused.value.reason
