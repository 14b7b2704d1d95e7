"""Whom counters count: two subjects never share a counter, at any door and in any store; one client has one counter."""

from __future__ import annotations

import hashlib
import ipaddress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import Clock
from tests.servers.redis_server import RedisServer
from tidegate import Limiter, MemoryCounters
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters import Charge, CounterStore
from tidegate.counters.redis.keyspace import key_of
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Check, Decision
from tidegate.doors.grpc.domains import FileDomain
from tidegate.doors.grpc.ratelimit_file import parse_ratelimit
from tidegate.doors.limited_subject import LONGEST_SUBJECT, fit_subject
from tidegate.gate.gate import Gate
from tidegate.ip_addresses import client_of
from tidegate.policy.descriptors import entries_subject
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.matching import CompiledTier, subject_of
from tidegate.policy.model import Tier
from tidegate.policy.rules import Rule, Subject
from tidegate.policy.toml_reader import parse_policy

LONG = "x" * (LONGEST_SUBJECT + 1)
DIGEST = "h:" + hashlib.blake2b(LONG.encode(), digest_size=32).hexdigest()
"""How a limiter counts `LONG`."""


def nasty() -> st.SearchStrategy[str]:
    """Subjects that look like what stands for others: prefixes, digests, ids, separators, tokens of the stores."""
    pieces = st.sampled_from(
        ["h:", "k:", "i:", "t:", "d:", "#", "=", "{", "}", ":", "0:", "1:", "/", "%3D", "%", "&", "\0", "é", "\udcff", " "]
    )
    ids = st.text("0123456789abcdef", min_size=24, max_size=24).map("k:".__add__)
    digests = st.binary(max_size=4).map(lambda raw: "h:" + hashlib.blake2b(raw, digest_size=32).hexdigest())
    return st.lists(pieces | st.text(max_size=50) | ids | digests | st.just(LONG), min_size=1, max_size=4).map("".join)


names = st.sampled_from(["a", "a:b", "a:b:c", "limiter/a", "envoy/a/b", "a\0b"]) | st.text(min_size=1, max_size=8)


@given(st.lists(nasty(), min_size=2, max_size=6, unique=True))
@example([LONG, DIGEST])
@example([LONG, DIGEST, "h:" + hashlib.blake2b(DIGEST.encode(), digest_size=32).hexdigest()])
def test_subjects_of_a_limiter_are_apart(subjects: list[str]) -> None:
    subjects = [subject for subject in subjects if subject]
    assert len({fit_subject(subject) for subject in subjects}) == len(subjects)


async def test_a_digest_and_the_long_subject_that_it_is_of_count_apart() -> None:
    limiter = Limiter("1/day", counters=MemoryCounters(clock=Clock()))
    assert (await limiter.check(LONG)).allowed
    assert (await limiter.check(DIGEST)).allowed
    assert not (await limiter.check(LONG)).allowed
    await limiter.reset(DIGEST)
    assert not (await limiter.check(LONG)).allowed
    assert [each.allowed for each in await limiter.check_many([(DIGEST, 1), (LONG, 1)])] == [True, False]  # type: ignore[union-attr]


async def test_a_limiter_and_a_tier_that_is_named_like_one_count_apart() -> None:
    counters = MemoryCounters(clock=Clock())
    rule = Rule.make("/", ["1/day"], name="1/day")
    tier = CompiledTier(Tier.make("limiter", [rule]))
    assert (await Limiter("1/day", counters=counters).check("k:1")).allowed
    assert counters.charge_one(tier.rules[0].limits, "k:1", 1).allowed


addresses = st.ip_addresses(v=4).map(lambda ip: ("i", ip)) | st.integers(0, (1 << 64) - 1).map(
    lambda network: ("i", ipaddress.IPv6Network(((0x2A00 << 112) + (network >> 16 << 64), 64)))
)
callers = (
    addresses
    | st.text("0123456789abcdef", min_size=24, max_size=24).map(lambda key_id: ("k", key_id))
    | st.sampled_from(["a", "i", "k", "203.0.113.7"]).map(lambda tier: ("t", tier))
    | st.lists(st.tuples(nasty(), nasty()), min_size=1, max_size=3).map(lambda entries: ("d", tuple(entries)))
)


def gate_subject(caller: tuple[str, Any]) -> str:
    """The subject that a door's caller is counted as."""
    kind, what = caller
    if kind == "k":
        return subject_of(Subject.API_KEY, f"k:{what}", None, "t") or ""
    if kind == "t":
        return subject_of(Subject.TIER, "", None, what) or ""
    if kind == "d":
        return entries_subject(what)
    if isinstance(what, ipaddress.IPv4Address):
        return subject_of(Subject.IP, "", client_of(str(what)), "t") or ""
    return subject_of(Subject.IP, "", client_of(str(what[1])), "t") or ""


@given(st.lists(callers, min_size=2, max_size=8, unique=True))
def test_callers_at_a_gate_are_apart(found: list[tuple[str, Any]]) -> None:
    assert len({gate_subject(each) for each in found}) == len(found)


@given(st.lists(st.tuples(names, st.sampled_from(list(Algorithm)), nasty()), min_size=2, max_size=8, unique=True))
def test_counters_are_apart_in_memory_and_in_redis(found: list[tuple[str, Algorithm, str]]) -> None:
    store = MemoryCounters(clock=Clock())
    sets = {(name, algorithm): LimitSet(name, algorithm, [Limit.parse("1/day")]) for name, algorithm, _ in found}
    bucket = {Algorithm.TOKEN_BUCKET, Algorithm.LEAKY_BUCKET}
    for name, algorithm, subject in found:
        assert store.charge_one(sets[name, algorithm], subject, 1).allowed
    # The two kinds of bucket are one algorithm to Redis: a rule that changes from one to the other keeps what was consumed.
    wanted = {(name, algorithm in bucket or algorithm, subject) for name, algorithm, subject in found}
    assert len({key_of(sets[name, algorithm], subject) for name, algorithm, subject in found}) == len(wanted)


SUBJECTS = (
    *("a", "=a", "h:", DIGEST, LONG, LONG + "x", "k:" + "0" * 24, "k:" + "0" * 23, "k0" * 13, "#" + "A" * 22, "k" + "A" * 16),
    *("{a}", "a}b", "a\0", "é", "\udcff", "x" * 40, "x" * 41, "i:203.0.113.7", "t:a", "d:a=b", "0:a", "1:0:a"),
)


async def test_counters_of_odd_subjects_are_apart_in_every_store(redis_server: RedisServer) -> None:
    redis = RedisCounters(redis_server.url, 2.0)
    await redis.start()
    stores: list[CounterStore] = [MemoryCounters(), redis]
    for store in stores:
        limits = LimitSet("test_subjects", Algorithm.FIXED_WINDOW, [Limit.parse("1/366d")])
        charges = [Charge(((limits, subject),), 1) for subject in SUBJECTS]
        for allowed in (True, False):
            outcomes = await store.charge(charges)
            assert {isinstance(each, Decision) and each.allowed for each in outcomes} == {allowed}
        await store.reset([(limits, subject) for subject in SUBJECTS])
    await redis.close()


ODD_VALUES = (
    ":",
    "::",
    "/",
    "//",
    "\0",
    "\0\0",
    "😀",
    "😀😀",
    "x" * 256,
    "x" * 255,
    "é" * 256,
    "{a}",
    "a}b",
    "&",
    "=",
    "%26",
    "#",
    "h:x",
)


async def test_attributes_of_odd_values_are_apart_in_every_store(redis_server: RedisServer) -> None:
    """Through the gate, alone and combined with another attribute."""
    policy = """
    [callers]
    default_tier = "odd-values"
    [[tiers]]
    name = "odd-values"
      [[tiers.rules]]
      endpoint = "/one"
      subject = "user"
      limits = ["1/366d"]
      algorithm = "fixed_window"
      [[tiers.rules]]
      endpoint = "/both"
      subject = ["org", "user"]
      limits = ["1/366d"]
      algorithm = "fixed_window"
    """
    checks = [Check.of("/one", attributes={"user": value}) for value in ODD_VALUES]
    for value in ODD_VALUES[:10]:
        checks += [Check.of("/both", attributes={"org": value, "user": other}) for other in ODD_VALUES[:10]]
    redis = RedisCounters(redis_server.url, 2.0)
    await redis.start()
    stores: list[CounterStore] = [MemoryCounters(), redis]
    for store in stores:
        gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(policy))), store)
        for allowed in (True, False):
            outcomes = await gate.check_many(checks)
            assert {isinstance(each, Decision) and each.allowed for each in outcomes} == {allowed}
    await redis.close()


async def test_domains_whose_names_have_a_slash_count_apart() -> None:
    async def name(domain: str, key: str) -> str:
        text = f"domain: {domain}\ndescriptors:\n  - key: {key}\n    rate_limit: {{unit: day, requests_per_unit: 1}}\n"
        (part,) = await FileDomain(parse_ratelimit([("f", text)])[0]).parts([([(key, "v")], 1, None)])
        plan: Any = part.plan
        return str(plan.charges[0].counters[0][0].name)

    assert await name("a/b", "c") != await name("a", "b/c")
    assert await name("a", "c") == "envoy/a/c"


@pytest.mark.parametrize(
    ("ip", "client"),
    [
        ("64:ff9b::203.0.113.7", "203.0.113.7"),
        ("::203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("::ffff:0:203.0.113.7", "203.0.113.7"),
        ("2002:cb00:7107::1", "203.0.113.7"),
        ("2002:cb00:7107:ffff::1", "203.0.113.7"),
        ("2001:0:4136:e378:8000:63bf:34ff:8ef8", "203.0.113.7"),
        ("64:ff9b:1:fffe::203.0.113.7", "64:ff9b:1:fffe::cb00:7107"),
        ("2001:db8::1", "2001:db8::/64"),
        ("64:ff9c::203.0.113.7", "64:ff9c::/64"),
        ("::1", "::/64"),
        ("::", "::/64"),
        ("203.0.113.7", "203.0.113.7"),
    ],
)
def test_an_address_that_a_translator_made_counts_as_the_ipv4_client_behind_it(ip: str, client: str) -> None:
    assert client_of(ip) == client


async def test_clients_of_one_translator_have_limits_of_their_own() -> None:
    policy = parse_policy('[[tiers]]\nname = "open"\nlimits = ["1/day"]\n[anonymous]\ntier = "open"\n')
    gate = Gate(CachedCatalog(PolicyCatalog(policy)), MemoryCounters(clock=Clock()))
    for form in ("64:ff9b::{}", "::{}", "::ffff:0:{}"):
        allowed = [(await gate.check(Check.of("/", ip=form.format(ip)))).allowed for ip in ("203.0.113.7", "203.0.113.8")]
        assert len(set(allowed)) == 1, "the second client is answered as the first one was"
    assert not (await gate.check(Check.of("/", ip="203.0.113.8"))).allowed, "however a client's address is written, it is one"
