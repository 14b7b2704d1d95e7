"""Requests at a steady rate over connections that are kept, and which of them failed: a client of a balancer.

    python -m drills.http_load URL SECONDS RATE

asks from a process of its own, so that it may run in another network namespace; says when it was answered first, and for so long
from then on what it saw, as JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

PATIENCE_S: Final = 10.0
KEY: Final = "demo-drill-key-0001"
POLICY: Final = f"""
[[tiers]]
name = "drill"
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["100000000/day"]
[[api_keys]]
key = "{KEY}"
tier = "drill"
"""
_REQUEST: Final = "GET /v1/authorize HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {key}\r\nX-Original-URI: /item\r\n\r\n"


class Asked(NamedTuple):
    """One request.

    Args:
        at_s: since the start.
        latency_s: until the answer, or until it failed.
        failure: what went wrong, in a word or two; None where it was answered with 204.
    """

    at_s: float
    latency_s: float
    failure: str | None


class Answer(NamedTuple):
    """What a server answered.

    Args:
        status: of HTTP.
        closes: whether the connection ends with it.
    """

    status: int
    body: bytes
    closes: bool


class HttpLoad:
    """Asks `/v1/authorize` from some connections, each of which waits for its answer before it asks again.

    A request that meets a closed connection before anything of it was sent is sent on a new one, as every client does. Everything
    else that is not answered with 204 is a failure.

    Args:
        url: of the server, without path.
        rate: requests a second in all; fewer, where answers take longer.
        patience_s: how long to wait for a connection and for an answer.
    """

    def __init__(self, url: str, rate: float, connections: int = 8, patience_s: float = PATIENCE_S) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        self._request = _REQUEST.format(host=parts.netloc, key=KEY).encode()
        self._pause_s = connections / rate
        self._connections = connections
        self._patience_s = patience_s
        self.asked: list[Asked] = []

    async def run(self, until: asyncio.Event) -> None:
        """Ask until the event is set.

        Args:
            until: ends it; each connection still gets its last answer.
        """
        started = time.monotonic()
        await asyncio.gather(*(self._ask_on(number, started, until) for number in range(self._connections)))

    @property
    def failures(self) -> Counter[str]:
        """How many requests failed, by reason."""
        return Counter(each.failure for each in self.asked if each.failure is not None)

    @property
    def longest_gap_s(self) -> float:
        """The longest time in which no request was answered well, s: what the client saw of an outage."""
        answered = sorted(each.at_s + each.latency_s for each in self.asked if each.failure is None)
        return max((after - before for before, after in itertools.pairwise(answered)), default=0.0)

    def question(self) -> tuple[bytes, Any]:
        """What to ask next: the bytes of the request, and the value that `heard` receives with its answer."""
        return self._request, None

    def heard(self, about: Any, at_s: float, latency_s: float, answer: Answer | None, failure: str | None) -> None:
        """Take in what became of a request.

        Args:
            about: as `question` gave it.
            at_s: when it was sent, s since the start.
            latency_s: until the answer, or until it failed.
            answer: None where none came.
            failure: why none came.
        """
        del about
        if answer is not None and answer.status != 204:
            failure = f"status {answer.status}"
        self.asked.append(Asked(at_s, latency_s, failure))

    def latency_ms(self, quantile: float) -> float:
        """A quantile of the requests that were answered well, ms.

        Args:
            quantile: 0 to 1.
        """
        latencies = sorted(each.latency_s for each in self.asked if each.failure is None)
        return latencies[min(int(quantile * len(latencies)), len(latencies) - 1)] * 1000 if latencies else 0.0

    async def _ask_on(self, number: int, started: float, until: asyncio.Event) -> None:
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        due = started + self._pause_s * number / self._connections
        while not until.is_set():
            await asyncio.sleep(max(due - time.monotonic(), 0))
            due = max(due + self._pause_s, time.monotonic())
            at = time.monotonic()
            request, about = self.question()
            answer: Answer | None = None
            failure: str | None = None
            try:
                async with asyncio.timeout(self._patience_s):
                    if reader is None or writer is None or reader.at_eof():
                        _close(writer)
                        reader, writer = await asyncio.open_connection(self._host, self._port)
                    writer.write(request)
                    await writer.drain()
                    head = await reader.readuntil(b"\r\n\r\n")
                    answer = await _read(head, reader)
                    if answer.closes:
                        _close(writer)
                        reader = writer = None
            except TimeoutError:
                failure = "no answer in time"
            except (OSError, asyncio.IncompleteReadError) as error:
                failure = type(error).__name__
            if failure is not None:
                _close(writer)
                reader = writer = None
            self.heard(about, at - started, time.monotonic() - at, answer, failure)
        _close(writer)


async def _read(head: bytes, reader: asyncio.StreamReader) -> Answer:
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(int(status.split(" ")[1]), body, headers.get("connection", "").lower() == "close")


def _close(writer: asyncio.StreamWriter | None) -> None:
    if writer is not None:
        writer.close()


async def _main(url: str, seconds: float, rate: float) -> None:
    # Long waits would hide how soon the other balancer answers: a client that asks anew is what is measured.
    load = HttpLoad(url, rate, connections=4, patience_s=0.5)
    until = asyncio.Event()
    running = asyncio.create_task(load.run(until))
    while not any(each.failure is None for each in load.asked):
        await asyncio.sleep(0.01)
    print("answered", flush=True)
    load.asked.clear()
    await asyncio.sleep(seconds)
    until.set()
    await running
    print(json.dumps({"asked": len(load.asked), "failures": dict(load.failures), "longest_gap_s": load.longest_gap_s}))


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
