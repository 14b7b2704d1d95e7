"""Checks at a steady rate through the balancer, as a back end asks them, and what became of each."""

from __future__ import annotations

import random
import time
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec

from drills.admissions import Admission
from drills.http_load import Answer, HttpLoad
from tidegate.counters.redis.keyspace import slot_of

TIER: Final = "public"
TIGHT, LOOSE = "tight", "loose"
_PLENTY: Final = 100_000_000
CONNECTIONS: Final = 48
"""As many as a back end of some threads keeps: while answers take up to 0.1 s, the rate is kept."""
_BATCH: Final = 100
_REQUEST: Final = (
    "POST /v1/check HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
)


def policy_of(tight: str) -> str:
    """The policy of a drill: callers are counted by ip, under one limit that they meet and one that they do not.

    Args:
        tight: the limit that they meet.

    Returns:
        Text of a policy file.
    """
    return f"""\
[[tiers]]
name = "{TIER}"
  [[tiers.rules]]
  name = "{TIGHT}"
  endpoint = "/{TIGHT}"
  algorithm = "fixed_window"
  limits = ["{tight}"]
  subject = "ip"
  [[tiers.rules]]
  name = "{LOOSE}"
  endpoint = "/{LOOSE}"
  algorithm = "fixed_window"
  limits = ["{_PLENTY}/366d"]
  subject = "ip"
[anonymous]
tier = "{TIER}"
"""


class Seen(NamedTuple):
    """One check.

    Args:
        at_s: when it was sent, s since the start.
        latency_s: until the answer, or until it failed.
        rule: `tight` or `loose`.
        ip: whom it counted.
        allowed: the answer; False where there was none.
        degraded: whether it was decided without Redis; False where there was no answer.
        failure: why there was none, in a word or two; None where there was one.
    """

    at_s: float
    latency_s: float
    rule: str
    ip: str
    allowed: bool
    degraded: bool
    failure: str | None = None

    @property
    def end_s(self) -> float:
        """When it was answered or failed, s since the start."""
        return self.at_s + self.latency_s

    @property
    def slot(self) -> int:
        """Where a cluster counts it."""
        return slot_of(subject_of(self.ip))


def subject_of(ip: str) -> str:
    """As counters name an address."""
    return f"i:{ip}"


class _Decided(msgspec.Struct):
    """Of an answer's body, what is looked at."""

    allowed: bool
    degraded: bool


class CheckLoad(HttpLoad):
    """Asks `/v1/check` about some addresses, each as often as any other, under the tight and the loose rule.

    An answer is a decision, 200 or 429. Everything else is a failure.

    Args:
        url: of the balancer.
        rate: checks a second in all.
        subjects: how many addresses take turns.
    """

    def __init__(self, url: str, rate: float, subjects: int, connections: int = CONNECTIONS) -> None:
        super().__init__(url, rate, connections)
        self.rate = rate
        self.ips = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(1, subjects + 1)]
        self.seen: list[Seen] = []
        self.answers: list[Admission] = []
        """The same, as the checker of exactness reads it; answers only."""
        host = urlsplit(url).netloc
        self._round = [(_request(host, rule, ip), (rule, ip)) for ip in self.ips for rule in (TIGHT, LOOSE)]
        # In another order each round: else the balancer's turns would bring each address to the same instance again and again.
        self._order = random.Random(0)
        self._left: list[tuple[bytes, tuple[str, str]]] = []
        self._decided = msgspec.json.Decoder(_Decided)

    def question(self) -> tuple[bytes, Any]:
        if not self._left:
            self._left = self._order.sample(self._round, len(self._round))
        return self._left.pop()

    def heard(self, about: Any, at_s: float, latency_s: float, answer: Answer | None, failure: str | None) -> None:
        rule, ip = about
        decided = None
        if answer is not None:
            if answer.status in (200, 429):
                decided = self._decided.decode(answer.body)
            else:
                failure = f"status {answer.status}"
        if decided is None:
            self.seen.append(Seen(at_s, latency_s, rule, ip, False, False, failure))
            return
        self.seen.append(Seen(at_s, latency_s, rule, ip, decided.allowed, decided.degraded))
        now_us = time.time_ns() // 1000
        name = f"{TIER}:{rule}"
        sent_us = now_us - round(latency_s * 1e6)  # by the clock that is not stepped
        self.answers.append(Admission(name, subject_of(ip), 1, decided.allowed, decided.degraded, sent_us, now_us))

    def counted(self, instance_url: str, rule: str = LOOSE, plenty: int = _PLENTY) -> dict[str, int]:
        """Ask an instance what Redis has counted; consumes nothing.

        Args:
            plenty: its limit, which nobody must have used up.

        Returns:
            Units by address.

        Raises:
            RuntimeError: if Redis cannot be asked.
        """
        found = {}
        with httpx.Client(base_url=instance_url, timeout=10) as client:
            for ip in self.ips:
                usage = client.get("/v1/usage", headers={"X-Real-IP": ip}).raise_for_status().json()
                usage_of_rule = next(each for each in usage["rules"] if each["rule"] == rule)
                if usage_of_rule["degraded"] or usage_of_rule["remaining"] is None:
                    raise RuntimeError(f"Redis cannot be asked what it has counted of {ip}: {usage_of_rule}")
                found[ip] = plenty - usage_of_rule["remaining"]
        return found


def fill(instance_url: str, subjects: int) -> None:
    """Let Redis hold counters of more addresses under the loose rule; no load asks about them.

    Raises:
        RuntimeError: if one was not admitted.
    """
    numbers = range(1, subjects + 1)
    with httpx.Client(base_url=instance_url, timeout=30) as client:
        # Small ones: a busy machine is to answer them within a check's deadline. What it does not is put back.
        for first in range(0, subjects, _BATCH):
            checks = [
                {"path": f"/{LOOSE}", "ip": f"172.{16 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"}
                for number in numbers[first : first + _BATCH]
            ]
            answer = client.post("/v1/check/batch", json={"checks": checks}).raise_for_status().json()
            refused = next((decision for decision in answer["decisions"] if not decision.get("allowed")), None)
            if refused is not None:
                raise RuntimeError(f"a check was not admitted: {refused}")


def _request(host: str, rule: str, ip: str) -> bytes:
    body = f'{{"path":"/{rule}","ip":"{ip}"}}'
    return _REQUEST.format(host=host, length=len(body), body=body).encode()
