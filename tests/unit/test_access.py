"""Who is allowed or denied before anything is counted: entries of the policy, blocks, and the tables of networks."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cases.doors import FREE
from tidegate.catalog.blocks import API_KEY_ID, ATTRIBUTE, CIDR, CUSTOMER, Block, BlockIndex, Blocks
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import ALL, BLOCK, KEY
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision
from tidegate.errors import Blocked, CatalogUnavailable, InvalidApiKey, PolicyError
from tidegate.gate.gate import Gate
from tidegate.gate.subjects import DescriptorCheck
from tidegate.observation import Observation
from tidegate.policy.access import access_entry, require_exact_attributes
from tidegate.policy.key_format import hash_api_key, make_api_key
from tidegate.policy.networks import NEVER, NOT_FOUND, NetworkTable, parse_network
from tidegate.policy.toml_reader import parse_policy
from tidegate.policy.toml_writer import policy_text
from tidegate.timestamps import US_PER_S, now_us

KEY_ID = hash_api_key(FREE)[:24]
TIERS = f"""
[[tiers]]
name = "free"
limits = ["2/day"]
[anonymous]
tier = "free"
[[api_keys]]
key = "{FREE}"
tier = "free"
"""
ACCESS = f"""{TIERS}
[[access]]
action = "deny"
from = ["203.0.113.0/24", "2001:db8:bad::/48"]
[[access]]
action = "allow"
from = ["203.0.113.7", "10.0.0.0/8"]
[[access]]
action = "deny"
from = ["10.6.0.0/16"]
[[access]]
action = "deny"
match = {{ plan = "trial*", org = "acme" }}
[[access]]
action = "allow"
match = {{ plan = "internal" }}
"""


def gate_of(text: str = TIERS, observed: list[Observation] | None = None) -> Gate:
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(text))), MemoryCounters(), None if observed is None else observed.append)


async def answer_of(gate: Gate, **fields: object) -> str:
    """How a check is answered: denied, exempt from limits, or counted."""
    try:
        decision = await gate.check(Check.of("/a", **fields))  # type: ignore[arg-type]
    except Blocked:
        return "denied"
    return "exempt" if decision.limit is None else "counted"


@pytest.mark.parametrize(
    ("ip", "expected"),
    [
        ("203.0.113.8", "denied"),
        ("203.0.113.7", "exempt"),
        ("203.0.114.1", "counted"),
        ("10.1.2.3", "exempt"),
        ("10.6.2.3", "denied"),
        ("2001:db8:bad::1", "denied"),
        ("2001:db8:bad0::1", "counted"),
        # The IPv4 address behind a translator or a tunnel.
        ("64:ff9b::203.0.113.8", "denied"),
        ("2002:cb00:7108::1", "denied"),
        ("::ffff:203.0.113.8", "denied"),
        ("64:ff9b::10.1.2.3", "exempt"),
    ],
)
async def test_the_longest_prefix_decides(ip: str, expected: str) -> None:
    gate = gate_of(ACCESS)
    assert await answer_of(gate, ip=ip) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"attributes": {"plan": "trial-7", "org": "acme"}}, "denied"),
        ({"attributes": {"plan": "trial-7", "org": "other"}}, "counted"),
        ({"attributes": {"plan": "internal"}}, "exempt"),
        # A denial wins over what another entry allows.
        ({"attributes": {"plan": "internal"}, "ip": "203.0.113.8"}, "denied"),
        ({"attributes": {"plan": "trial", "org": "acme"}, "ip": "10.1.2.3"}, "denied"),
        ({"api_key": FREE, "ip": "203.0.113.8"}, "denied"),
    ],
)
async def test_a_denial_wins_over_an_allowance(fields: dict[str, object], expected: str) -> None:
    assert await answer_of(gate_of(ACCESS), **{"ip": "192.0.2.1", **fields}) == expected


async def test_an_allowed_client_is_authenticated_and_charged_to_nothing() -> None:
    observed: list[Observation] = []
    gate = gate_of(ACCESS, observed)
    for _ in range(5):
        assert (await gate.check(Check.of("/a", api_key=FREE, ip="10.1.2.3"))).allowed
    with pytest.raises(InvalidApiKey):
        await gate.check(Check.of("/a", api_key=make_api_key(), ip="10.1.2.3"))
    left = await gate.check(Check.of("/a", api_key=FREE, ip="192.0.2.1"))
    assert left.remaining == 1, "nothing was charged before"
    assert [each.error for each in observed] == [None] * 5 + ["INVALID_API_KEY", None]
    assert (gate.access.exempt, gate.access.denied) == (5, 0)


async def test_a_denied_client_causes_no_look_up_and_is_observed() -> None:
    observed: list[Observation] = []
    gate = gate_of(ACCESS, observed)
    with pytest.raises(Blocked, match="ask the operator"):
        await gate.check(Check.of("/a", api_key=make_api_key(), ip="203.0.113.8"))
    assert len(gate.catalog) == 0
    assert [(each.decision, each.error) for each in observed] == [(None, "BLOCKED")]
    assert gate.access.denied == 1


async def test_each_check_of_a_batch_has_its_own_answer() -> None:
    gate = gate_of(ACCESS)
    ips = ("203.0.113.8", "10.1.2.3", "192.0.2.1")
    answers: Sequence[object] = await gate.check_many([Check.of("/a", api_key=FREE, ip=ip) for ip in ips])
    assert [
        each.code if isinstance(each, Blocked) else each.limit for each in answers if isinstance(each, Blocked | Decision)
    ] == [
        "BLOCKED",
        None,
        2,
    ]
    denied, exempt, _ = await gate.plan_many([DescriptorCheck({"a": "b"}, None, 1, ip) for ip in ips])
    assert isinstance(denied, Blocked)
    assert exempt is not None


async def test_limits_in_the_request() -> None:
    gate = gate_of(
        f"""{TIERS}
        [[access]]
        action = "deny"
        match = {{ namespace = "emails", subject = "spammer" }}
        [[access]]
        action = "allow"
        match = {{ subject = "test-*" }}
        """
    )
    limits = gate.request_limits
    namespaces = await limits.namespaces()
    with pytest.raises(Blocked):
        limits.read(namespaces, "emails", "spammer", ["1/day"])
    exempt = limits.read(namespaces, "emails", "test-1", ["1/day"])
    counted = limits.read(namespaces, "sms", "spammer", ["1/day"])
    outcomes = await limits.check_many([counted, exempt, exempt, counted])
    assert [isinstance(each, Decision) and each.allowed for each in outcomes] == [True, True, True, False]


async def test_a_key_that_replaced_a_blocked_one_is_blocked() -> None:
    text = TIERS.replace("[[api_keys]]", f'[[access]]\naction = "deny"\napi_key_id = "{KEY_ID}"\n[[api_keys]]')
    policy = parse_policy(text)
    catalog = PolicyCatalog(policy)
    successor = make_api_key()
    original = policy.api_keys[0]
    rotated = msgspec.structs.replace(original, sha256=hash_api_key(successor), counts_as=original.id)
    catalog.replace(msgspec.structs.replace(policy, api_keys=(original, rotated)))
    gate = Gate(CachedCatalog(catalog), MemoryCounters())
    assert await answer_of(gate, api_key=FREE) == "denied"
    assert await answer_of(gate, api_key=successor) == "denied"
    assert await answer_of(gate, ip="192.0.2.1") == "counted"


async def test_a_replaced_policy_decides_the_next_check() -> None:
    catalog = PolicyCatalog(parse_policy(TIERS))
    cached = CachedCatalog(catalog)
    gate = Gate(cached, MemoryCounters())
    assert await answer_of(gate, ip="203.0.113.8") == "counted"
    assert not cached.access.active
    catalog.replace(parse_policy(ACCESS))
    cached.changed(await catalog.changes(0))
    assert await answer_of(gate, ip="203.0.113.8") == "denied"
    catalog.replace(parse_policy(TIERS))
    cached.changed(await catalog.changes(0))
    assert await answer_of(gate, ip="203.0.113.8") == "counted"
    assert not cached.access.active


def blocked_by(*blocks: Block) -> Gate:
    gate = gate_of()
    index = BlockIndex()
    for block in blocks:
        index.apply(block)
    gate.catalog.access.replace_blocks(index)
    return gate


@pytest.mark.parametrize(
    ("kind", "target", "fields"),
    [
        (CIDR, "203.0.113.0/24", {"ip": "203.0.113.9"}),
        (CIDR, "2001:db8::/64", {"ip": "2001:db8::9"}),
        (API_KEY_ID, KEY_ID, {"api_key": FREE}),
        (ATTRIBUTE, "org=a%26b&user=42", {"attributes": {"org": "a&b", "user": "42", "more": "x"}}),
    ],
)
async def test_a_block_ends_by_itself(kind: str, target: str, fields: dict[str, object]) -> None:
    fields = {"ip": "192.0.2.1", **fields}
    assert await answer_of(blocked_by(Block(1, kind, target)), **fields) == "denied"
    later = now_us() + 3600 * US_PER_S
    index = blocked_by(Block(1, kind, target, later)).catalog.access.blocks
    assert await answer_of(blocked_by(Block(1, kind, target, later)), **fields) == "denied"
    index.drop_ended(later)
    assert not index
    assert len(index) == 0
    past = blocked_by(Block(1, kind, target))
    past.catalog.access.blocks.apply(Block(2, kind, target, now_us() - 1))
    assert await answer_of(past, **fields) != "denied"


async def test_an_end_that_was_moved_is_the_one_that_holds() -> None:
    index = BlockIndex()
    first = now_us() + 3600 * US_PER_S
    index.apply(Block(1, CIDR, "203.0.113.0/24", first))
    index.apply(Block(2, CIDR, "203.0.113.0/24", first + 1))
    index.drop_ended(first)
    assert len(index) == 1
    index.drop_ended(first + 1)
    assert len(index) == 0


async def test_the_message_is_shown_and_nothing_else() -> None:
    gate = blocked_by(Block(1, CIDR, "203.0.113.0/24", message="write to abuse@example.com"), Block(2, CUSTOMER, "acme"))
    with pytest.raises(Blocked) as blocked:
        await gate.check(Check.of("/a", ip="203.0.113.9"))
    assert (blocked.value.message, blocked.value.details) == ("write to abuse@example.com", {})


class Stored:
    """Blocks of a database that can fail."""

    def __init__(self) -> None:
        self.rows: list[Block] = []
        self.now = 5
        self.failing = False
        self.read: list[str] = []

    async def version(self) -> int:
        if self.failing:
            raise CatalogUnavailable("the database does not answer")
        return self.now

    async def holding_blocks(self, after_id: int, limit: int) -> list[Block]:
        self.read.append("all")
        return [each for each in self.rows if each.id > after_id and not each.ended][:limit]

    async def changed_blocks(self, version: int, after_id: int, limit: int) -> list[Block]:
        if self.failing:
            raise CatalogUnavailable("the database does not answer")
        self.read.append("changed")
        later = sorted(
            (each for each in self.rows if (each.version, each.id) > (version, after_id)), key=lambda each: each.version
        )
        return later[:limit]


async def test_only_changed_rows_are_read_again() -> None:
    stored = Stored()
    stored.rows = [Block(number, CIDR, f"203.0.113.{number}/32", version=number) for number in range(1, 4)]
    seen: list[int] = []
    blocks = Blocks(stored, lambda index: seen.append(len(index)))
    await blocks.load()
    assert (stored.read.count("all"), len(blocks)) == (2, 3)
    stored.rows[0] = Block(1, CIDR, "203.0.113.1/32", ended=True, version=6)
    stored.rows.append(Block(4, CIDR, "203.0.113.4/32", version=6))
    stored.rows.append(Block(5, CIDR, "203.0.113.5/32", version=7))
    blocks.changed([(BLOCK, "")])
    await blocks.load()
    assert (stored.read.count("all"), len(blocks), seen) == (2, 4, [3, 4])
    # After a failover what was read may never have been.
    stored.rows = stored.rows[1:2]
    blocks.changed([], everything=True)
    await blocks.load()
    assert len(blocks) == 1


async def test_blocks_hold_while_the_database_is_away() -> None:
    stored = Stored()
    stored.rows = [Block(1, CIDR, "203.0.113.0/24", version=1)]
    blocks = Blocks(stored, lambda _: None)
    await blocks.load()
    stored.failing = True
    for everything in (False, True):
        blocks.changed([(ALL, "")], everything=everything)
        with pytest.raises(CatalogUnavailable):
            await blocks.load()
        assert len(blocks) == 1
    blocks.changed([(KEY, "x")])


NETWORKS = st.one_of(
    st.builds(
        lambda address, prefix: ipaddress.IPv4Network((address, prefix), strict=False), st.integers(0, 2**12), st.integers(16, 32)
    ),
    st.builds(
        lambda address, prefix: ipaddress.IPv4Network((address << 20, prefix), strict=False),
        st.integers(0, 2**12 - 1),
        st.integers(0, 32),
    ),
)


@given(st.lists(st.tuples(NETWORKS, st.booleans()), max_size=30), st.lists(st.integers(0, 2**32 - 1), max_size=5))
def test_a_table_finds_what_a_search_finds(steps: list[tuple[ipaddress.IPv4Network, bool]], more: list[int]) -> None:
    table = NetworkTable(32)
    known: set[ipaddress.IPv4Network] = set()
    for network, added in steps:
        if added:
            table.add(int(network.network_address), network.prefixlen)
            known.add(network)
        else:
            table.remove(int(network.network_address), network.prefixlen)
            known.discard(network)
    assert (len(table), bool(table)) == (len(known), bool(known))
    for address in (*more, *(int(network[-1]) for network, _ in steps), *(int(network[0]) for network, _ in steps)):
        expected = max((each.prefixlen for each in known if ipaddress.IPv4Address(address) in each), default=NOT_FOUND)
        assert table.find(address) == expected


def test_an_ended_network_leaves_the_wider_one() -> None:
    table = NetworkTable(128)
    wide, narrow = parse_network("2001:d00::/24"), parse_network("2001:db8::/48")
    table.add(int(wide.network_address), 24, NEVER)
    table.add(int(narrow.network_address), 48, now_us() - 1)
    assert table.find(int(ipaddress.ip_address("2001:db8::1"))) == 24


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('action = "deny"', "exactly one of 'from', 'match', 'customer' and 'api_key_id'"),
        ('action = "deny"\nfrom = ["10.0.0.0/8"]\ncustomer = "acme"', "exactly one of"),
        ('action = "drop"\nfrom = ["10.0.0.0/8"]', "action 'drop' is not known: use one of allow, deny"),
        ('action = "deny"\nfrom = "10.0.0.0/8"', "is not a list of networks"),
        ('action = "deny"\nfrom = ["10.0.0.7/8"]', r"has bits of the address after its prefix: write 10\.0\.0\.0/8"),
        ('action = "deny"\nfrom = ["ten"]', "is not valid: write 203.0.113.0/24"),
        ('action = "deny"\nfrom = []', "is not a list of networks"),
        ('action = "deny"\nmatch = {}', "match is empty"),
        ('action = "deny"\napi_key_id = "demo-free-key-0001"', "must be 24 lower-case hex digits"),
        ('action = "deny"\ncustomer = ""', "must be 1 to 64 printable characters"),
        ('action = "deny"\nform = ["10.0.0.0/8"]', "did you mean 'from'"),
        ('from = ["10.0.0.0/8"]', "'action' is missing"),
        ('action = "deny"\nfrom = [' + '"10.0.0.1",' * 10_001 + "]", "from has 10001 networks: at most 10000"),
    ],
)
def test_mistakes_in_entries(text: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        parse_policy(f"{TIERS}\n[[access]]\n{text}")


def test_a_policy_is_written_as_it_is_read() -> None:
    policy = parse_policy(
        ACCESS + f'[[access]]\naction = "allow"\ncustomer = "acme"\n[[access]]\naction = "deny"\napi_key_id = "{KEY_ID}"'
    )
    assert parse_policy(policy_text(policy)) == policy
    assert access_entry("deny", ["::ffff:1.2.3.4", "1.2.3.4", "2001:DB8::5"]).networks == ("1.2.3.4/32", "2001:db8::/64")


def test_attributes_of_a_block_are_exact() -> None:
    assert require_exact_attributes({"user": "42", "org": "acme"}) == {"org": "acme", "user": "42"}
    for given_attributes, reason in (
        ({}, "is empty"),
        ({"user": "4*"}, "one exact value"),
        ({"ip": "1.2.3.4"}, "name of a subject"),
    ):
        with pytest.raises(PolicyError, match=reason):
            require_exact_attributes(given_attributes)


ACTIONS = """
[[tiers]]
name = "free"
limits = ["5/day"]
  [[tiers.rules]]
  endpoint = "/internal/*"
  action = "deny"
  [[tiers.rules]]
  endpoint = "/internal/health"
  action = "allow"
  [[tiers.rules]]
  endpoint = "/closed"
  limits = ["0/day"]
  [[tiers.rules]]
  descriptor = { service = "old" }
  action = "deny"
  [[tiers.rules]]
  descriptor = { service = "new" }
  action = "allow"
[anonymous]
tier = "free"
"""


async def test_rules_that_deny_or_allow() -> None:
    gate = gate_of(ACTIONS)
    for path in ("/internal/a", "/closed"):
        with pytest.raises(Blocked, match="access is denied by the rule") as blocked:
            await gate.check(Check.of(path, ip="192.0.2.1"))
        assert blocked.value.details == {"rule": "/internal/*" if path == "/internal/a" else "/closed"}
    for _ in range(9):
        decision = await gate.check(Check.of("/internal/health", ip="192.0.2.1"))
        assert (decision.allowed, decision.limit, decision.tier) == (True, None, "free")
    assert (await gate.check(Check.of("/a", ip="192.0.2.1"))).remaining == 4, "neither charged the limits of the tier"
    old, new, other = await gate.plan_many([DescriptorCheck({"service": name}, None, 1) for name in ("old", "new", "else")])
    assert isinstance(old, Blocked)
    assert new is not None
    assert other is None
    [*listed] = (await gate.usage(ip="192.0.2.1")).rules
    assert [each.rule for each in listed] == [None], "nothing is left to know of them"
    await gate.reset(ip="192.0.2.1")


def test_actions_are_written_as_they_are_read() -> None:
    policy = parse_policy(ACTIONS)
    assert parse_policy(policy_text(policy)) == policy
    closed = next(rule for rule in policy.tiers[0].rules if rule.endpoint == "/closed")
    assert (closed.action, closed.limits) == ("deny", ())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ('action = "deny"\nlimits = ["1/day"]', "stands in place of limits and quotas"),
        ('action = "deny"\nquotas = ["1/day"]', "stands in place of limits and quotas"),
        ('action = "deny"\nmode = "shadow"', "is for rules with mode 'enforce', not 'shadow'"),
        ('action = "block"', "action 'block' is not known: use one of allow, deny"),
        ('limits = ["0/day"]\nmode = "shadow"', "is for rules with mode 'enforce'"),
        ('limits = ["0/day burst 5"]', "must be a whole number from 1"),
        ("", "'limits' is missing"),
    ],
)
def test_mistakes_in_actions(fields: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        parse_policy(f'[[tiers]]\nname = "free"\n[[tiers.rules]]\nendpoint = "/a"\n{fields}\n')


def test_a_limit_of_zero_elsewhere_names_the_remedy() -> None:
    with pytest.raises(PolicyError, match="use action = 'deny' on a rule, or a block"):
        parse_policy('[[tiers]]\nname = "free"\nlimits = ["0/day"]\n')


async def test_an_exempt_check_keeps_its_customer_on_every_path() -> None:
    policy = parse_policy(
        """
        [[tiers]]
        name = "free"
        limits = ["5/minute"]
        [[customers]]
        name = "acme"
        tier = "free"
        [[api_keys]]
        key = "demo-key-0001-abcdef"
        customer = "acme"
        tier = "free"
        [[access]]
        action = "allow"
        customer = "acme"
        """
    )
    observed: list[Observation] = []
    gate = Gate(CachedCatalog(PolicyCatalog(policy), l1_ttl_s=3600), MemoryCounters(), observed.append)
    check = Check.of("/x", api_key="demo-key-0001-abcdef")
    first = await gate.check(check)  # whose caller is not cached
    second = await gate.check(check)
    (third,) = await gate.check_many([check])
    assert isinstance(third, Decision)
    assert [each.caller and each.caller.customer for each in (first, second, third)] == ["acme"] * 3
    assert [each.customer for each in observed] == ["acme"] * 3


async def test_all_keys_of_a_customer() -> None:
    text = """
    [[tiers]]
    name = "free"
    limits = ["2/day"]
    [[customers]]
    name = "acme"
    [[api_keys]]
    key = "demo-acme-key-00001"
    tier = "free"
    customer = "acme"
    [[api_keys]]
    key = "demo-other-key-0001"
    tier = "free"
    """
    for action, expected in (("deny", "denied"), ("allow", "exempt")):
        gate = gate_of(f'{text}\n[[access]]\naction = "{action}"\ncustomer = "acme"\n')
        assert await answer_of(gate, api_key="demo-acme-key-00001") == expected
        assert await answer_of(gate, api_key="demo-other-key-0001") == "counted"
    gate = gate_of(text)
    index = BlockIndex()
    index.apply(Block(1, CUSTOMER, "acme"))
    gate.catalog.access.replace_blocks(index)
    assert await answer_of(gate, api_key="demo-acme-key-00001") == "denied"
    assert await answer_of(gate, api_key="demo-other-key-0001") == "counted"
