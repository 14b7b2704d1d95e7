"""Whose request it is behind proxies: addresses as gateways write them, at every door alike."""

from __future__ import annotations

import pytest

from tests.cpu_time import assert_growth_below, cpu_s
from tests.rsgi import RsgiHeaders
from tidegate.decision import BadRequest, Check
from tidegate.doors.client_address import MAX_HOPS, TrustedProxies, address_or_none, counted_client
from tidegate.errors import SettingsError
from tidegate.ip_addresses import PeerName, canonical_ip

GATEWAY = "10.0.0.1"
TRUSTED = TrustedProxies(["10.0.0.0/8", "2001:db8:ffff::/48", "192.0.2.80:443"])


def client(peer: str = GATEWAY, trusted: TrustedProxies = TRUSTED, **headers: str | tuple[str, ...]) -> str:
    pairs = []
    for name, values in headers.items():
        for value in (values,) if isinstance(values, str) else values:
            pairs.append((name.replace("_", "-"), value.encode("utf-8", "surrogateescape")))
    return trusted.client(peer, RsgiHeaders(pairs))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("203.0.113.9:4711", "203.0.113.9"),
        ("[203.0.113.9]", "203.0.113.9"),
        ("2001:DB8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("[2001:db8::1%eth0]:443", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("[::ffff:203.0.113.9]:80", "203.0.113.9"),
    ],
)
def test_addresses_as_gateways_write_them(text: str, address: str) -> None:
    assert canonical_ip(text) == address
    assert Check.of("/a", ip=text).ip == address
    assert client(X_Real_IP=text) == text
    assert address_or_none(client(X_Forwarded_For=text)) == address
    assert address_or_none(client(Forwarded=f'for="{text}"')) == address


@pytest.mark.parametrize(
    "text",
    ["", "unknown", "example.com", "1.2.3.400", "1.2.3", "1.2.3.4:", "1.2.3.4:123456", "1.2.3.4:http", "[::1", "::1]", "[::1]443",
     "[example]", "1.2.3.4%eth0",
     "[::1]:443:1", "1.2.3.4, 5.6.7.8", "::1%" + "e" * 100, "1.2.3.4\n", " 1.2.3.4", "0x7f.1", "01.2.3.4"],
)  # fmt: skip
def test_invalid_addresses(text: str) -> None:
    with pytest.raises(BadRequest, match="not an IPv4 or IPv6 address"):
        canonical_ip(text)
    assert address_or_none(text) is None
    lenient = Check.of("/a", ip=text, strict_ip=False)
    assert (lenient.ip, lenient.bad_ip is None) == (None, False)


@pytest.mark.parametrize(
    ("chain", "address"),
    [
        ("198.51.100.9", "198.51.100.9"),
        ("1.1.1.1, 198.51.100.9, 10.0.0.2", "198.51.100.9"),
        ("1.1.1.1, 198.51.100.9:5123, 10.0.0.2:80", "198.51.100.9"),
        ("198.51.100.9, [2001:db8:ffff::7]:443", "198.51.100.9"),
        ("198.51.100.9, 192.0.2.80", "198.51.100.9"),
        ("198.51.100.9,, 10.0.0.2, ,", "198.51.100.9"),
        ("198.51.100.9, ::ffff:10.0.0.2", "198.51.100.9"),
        ("10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("1.1.1.1, unknown, 10.0.0.2", None),
        (",, ,", GATEWAY),
    ],
)
def test_a_chain_of_proxies(chain: str, address: str | None) -> None:
    assert address_or_none(client(X_Forwarded_For=chain)) == address
    assert address_or_none(client(X_Forwarded_For=tuple(chain.split(",")))) == address


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ("for=198.51.100.9", "198.51.100.9"),
        ("For=198.51.100.9;proto=https;by=10.0.0.1", "198.51.100.9"),
        ('proto=https; for="[2001:db8::1]:4711"', "2001:db8::1"),
        ("for=[2001:db8::1]:4711", "2001:db8::1"),
        ('for=1.1.1.1, for=198.51.100.9;host="a,b;for=2.2.2.2", for=10.0.0.2', "198.51.100.9"),
        (r'for="198\.51.100.9"', "198.51.100.9"),
        (",, for=198.51.100.9 , ,", "198.51.100.9"),
        ("for=198.51.100.9, for=10.0.0.2, for=10.0.0.3", "198.51.100.9"),
        # Whoever is not named is not the one left of it.
        ("for=1.1.1.1, for=unknown, for=10.0.0.2", None),
        ("for=1.1.1.1, for=_hidden", None),
        ("for=1.1.1.1, proto=https", None),
        # What breaks the grammar, an open quote of the client's among it, does not move anybody.
        ('for=6.6.6.6;x=", for=198.51.100.9;host="api.example"', None),
        ('for="6.6.6.6, for=198.51.100.9', None),
        ("for=198.51.100.9 for=1.1.1.1", None),
        ("198.51.100.9", None),
        ("", GATEWAY),
    ],
)
def test_forwarded_as_rfc_7239_has_it(forwarded: str, address: str | None) -> None:
    assert address_or_none(client(Forwarded=forwarded)) == address


def test_which_header_goes_first() -> None:
    given = {"X_Real_IP": "192.0.2.1", "X_Forwarded_For": "192.0.2.2", "Forwarded": "for=192.0.2.3"}
    assert client(**given) == "192.0.2.1"
    assert client(**{**given, "X_Real_IP": ""}) == "192.0.2.2"
    assert client(Forwarded=given["Forwarded"]) == "192.0.2.3"
    assert client(peer="203.0.113.5", **given) == "203.0.113.5", "not a trusted one"
    assert client() == GATEWAY
    with pytest.raises(BadRequest, match="2 x-real-ip headers"):
        client(X_Real_IP=("192.0.2.1", "192.0.2.2"))


def test_peers_without_an_address() -> None:
    for peer in ("", "unix", "unix:", "unix:/run/app.sock"):
        assert client(peer, X_Real_IP="192.0.2.1") == PeerName("unix")
        assert client(peer, TrustedProxies(["unix"]), X_Real_IP="192.0.2.1") == "192.0.2.1"
    assert client("testclient") == PeerName("testclient")
    assert client("odd:peer\n" + "x" * 100) == PeerName(("odd_peer_" + "x" * 100)[:64])
    assert client(trusted=TrustedProxies(["10.0.0.0/8", "unix"]), X_Forwarded_For="192.0.2.1, unix:") == "192.0.2.1"
    assert Check.of("/a", ip=client("")).ip == "unix"
    assert Check.of("/a", ip="unix", strict_ip=False).ip is None, "a header's text is never taken for a peer's name"


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("198.51.100.9:5123", "198.51.100.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2:ffff::1]:443", "2001:db8:1:2::/64"),
        ("nonsense", GATEWAY),
        (PeerName("unix"), "unix"),
    ],
)
def test_a_client_counts_once_however_it_is_written(text: str, subject: str) -> None:
    assert counted_client(text, GATEWAY) == subject


def test_a_network_that_is_not_understood() -> None:
    with pytest.raises(SettingsError, match=r"'10\.0\.0\.0/99'.*'unix'"):
        TrustedProxies(["10.0.0.0/99"])


def test_long_chains_are_bounded_work() -> None:
    """Only the nearest hops are looked at, and reading them takes time in proportion to their length."""
    asked = []
    trusted = TrustedProxies(["127.0.0.0/8"])
    trusts = trusted.trusts
    trusted.trusts = lambda address: bool(asked.append(address)) or trusts(address)  # type: ignore[assignment, func-returns-value]
    chain = ",".join(f"127.0.{n // 250}.{n % 250}" for n in range(5000))
    assert client("127.0.0.1", trusted, X_Forwarded_For=chain) == "127.0.19.186"
    assert client("127.0.0.1", trusted, Forwarded=",".join(f"for={hop}" for hop in chain.split(","))) == "127.0.19.186"
    assert len(asked) == 2 * (MAX_HOPS + 1)

    for piece in (' \t"', 'for="\\', "a=;", ",", 'for="a"'):

        def cost_s(pieces: int, piece: str = piece) -> float:
            text = piece * pieces
            return cpu_s(lambda: client("127.0.0.1", trusted, Forwarded=text))

        assert_growth_below(1_000, cost_s, 2_000, 200_000)  # 100 times as much at the most, not 10,000
