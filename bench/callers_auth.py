"""What it costs that callers of the data plane need a token or a certificate: [callers_auth] beside open.

    python -m bench.callers_auth [--smoke]

The same data plane three times in one process, counters in memory: open, with tokens, with names of certificates. A thread
sends `GET /v1/authorize` over kept connections, with the token's header to each, so that only the authentication differs;
what the header itself costs to parse is printed apart. CPU is that of the thread of the server. Rounds are interleaved; the least
of each case counts, because other programs can only make it slower. The look-up alone is timed too: it has less noise.
"""

from __future__ import annotations

import asyncio
import socket
import time
import timeit

from bench.measure import Goal, asked_for_smoke, report
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.caller_tokens import CallerToken, CallerTokens, hash_caller_token, make_caller_token
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.callers_auth import CallersAuth, CertificateAuth, TokenAuth
from tidegate.doors.http import DataPlane
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy
from tidegate.server.listener import Listener

POLICY = """
[anonymous]
tier = "free"
[[tiers]]
name = "free"
[[tiers.rules]]
endpoint = "/*"
subject = "ip"
limits = ["1000000000/minute"]
"""
HEADER = "X-Tidegate-Token"
PIPELINED = 16
"""Requests that are sent at once on the connection: as many as a gateway has in flight."""


class Tokens:
    """A source of many tokens, as a large installation has them."""

    def __init__(self, *tokens: str) -> None:
        self._tokens = [
            CallerToken(hash_caller_token(token.encode()), f"gateway-{number}", frozenset({"check"}), 4_000_000_000_000_000)
            for number, token in enumerate(tokens)
        ]

    async def caller_tokens(self) -> list[CallerToken]:
        """See `CallerTokenSource`."""
        return self._tokens


class Client:
    """A connection that is kept.

    Args:
        token: None to send none.
    """

    def __init__(self, port: int, token: str | None) -> None:
        line = "" if token is None else f"{HEADER}: {token}\r\n"
        request = f"GET /v1/authorize HTTP/1.1\r\nHost: tidegate\r\nX-Original-URI: /api/v1/items\r\n{line}\r\n"
        self._requests = request.encode() * PIPELINED
        self._socket = socket.create_connection(("127.0.0.1", port))

    def send(self, count: int) -> None:
        """Send requests in batches, each after the responses to the last; every response must be 204."""
        for _ in range(count // PIPELINED):
            self._socket.sendall(self._requests)
            received = b""
            while received.count(b"\r\n\r\n") < PIPELINED:
                received += self._socket.recv(65_536)
            if received.count(b"HTTP/1.1 204") != PIPELINED:
                raise RuntimeError(f"the server answered {received[:300]!r}")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


class Peer(CertificateAuth):
    """As `CertificateAuth`, for connections without TLS: each counts as if its certificate had a name that is allowed."""

    def is_known(self, values: object, peer_names: tuple[str, ...]) -> bool:
        """See `CallersAuth.is_known`."""
        return super().is_known({}, peer_names or ("gw.edge.example.com",))

    async def require(self, scope: object, needed: str) -> None:
        """See `CallersAuth.require`: the first request comes here, until the policy is loaded."""


async def listening(callers: CallersAuth | None) -> tuple[Listener, int]:
    """A data plane at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters())
    listener = Listener(DataPlane(gate, {}, callers=callers), "127.0.0.1", port)
    await listener.start()
    return listener, port


async def cpu_us(client: Client, count: int) -> float:
    """CPU µs of the server's thread for one request."""
    started = time.thread_time()
    await asyncio.to_thread(client.send, count)
    return (time.thread_time() - started) / (count // PIPELINED * PIPELINED) * 1e6


def look_up_us(auth: CallersAuth, token: str, *names: str) -> float:
    """µs of one look-up of a caller that is known, with bytes that are new each time as a parser's are."""
    values = [{b"x-tidegate-token": bytes(bytearray(token.encode()))} for _ in range(1000)]

    def look_up() -> None:
        for each in values:
            auth.is_known(each, names)

    return min(timeit.repeat(look_up, number=20, repeat=9)) / 20_000 * 1e6


async def main() -> None:
    """Measure and report."""
    smoke = asked_for_smoke(__doc__)
    rounds, count = (3, 800) if smoke else (80, 800)
    names = [make_caller_token() for _ in range(1000)]
    token = names[500]
    tokens = CallerTokens(Tokens(*names))
    await tokens.load()
    by_token, by_name = TokenAuth(HEADER, tokens), Peer(["gw.example.com", "*.edge.example.com"])
    servers = {"open": await listening(None), "token": await listening(by_token), "mtls": await listening(by_name)}
    clients = {name: Client(port, token) for name, (_, port) in servers.items()}
    clients["no header"] = Client(servers["open"][1], None)
    taken: dict[str, list[float]] = {name: [] for name in clients}
    for client in clients.values():
        await cpu_us(client, count)
    for _ in range(rounds):
        for name, client in clients.items():
            taken[name].append(await cpu_us(client, count))
    for client in clients.values():
        client.close()
    for listener, _ in servers.values():
        await listener.stop(1)

    def added(name: str, to: str) -> float:
        return min(taken[name]) - min(taken[to])

    report(
        "callers_auth",
        "Authentication of callers, GET /v1/authorize, CPU of the server's thread",
        [
            ("open, µs CPU", min(taken["no header"]), None),
            ("open, with a header of that size that is not read, added µs", added("open", "no header"), None),
            ("token, added µs", added("token", "open"), Goal(at_most=1)),
            ("certificate's name, added µs", added("mtls", "open"), Goal(at_most=1)),
            ("look-up of a token alone, 1,000 tokens, µs", look_up_us(by_token, token), Goal(at_most=1)),
            ("look-up of a certificate's names alone, µs", look_up_us(by_name, token, "a.edge.example.com"), Goal(at_most=1)),
        ],
        smoke=smoke,
    )


if __name__ == "__main__":
    asyncio.run(main())
