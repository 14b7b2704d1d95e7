"""Checks by API key at a steady rate, and operators who change the catalog meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import httpx

from drills.check_load import Seen
from drills.http_load import Answer, HttpLoad

TOKEN: Final = "0123456789abcdef-of-a-drill"


class CheckResult(NamedTuple):
    """What became of one check.

    Args:
        at_s: when it was sent, s since the start.
        latency_s: until the answer, or until it failed.
        key: who asked.
        status: of HTTP; 0 where no answer came.
        code: of the error; empty for none.
    """

    at_s: float
    latency_s: float
    key: str
    status: int
    code: str

    @property
    def decided(self) -> bool:
        """Whether it was allowed or refused for its limit."""
        return self.status in (200, 429)

    @property
    def seen(self) -> Seen:
        """The same for the picture of a drill: a refusal of an unknown or revoked key counts as an answer."""
        answered = self.decided or self.status in (401, 403)
        return Seen(self.at_s, self.latency_s, "", self.key, self.status == 200, False, None if answered else self.code)


class KeyLoad(HttpLoad):
    """Asks `/v1/check` with keys that a function gives.

    Args:
        url: of an instance or a balancer.
        rate: checks a second in all.
        next_key: who asks next.

    Attributes:
        results: of every check.
    """

    def __init__(self, url: str, rate: float, next_key: Callable[[], str], connections: int = 8) -> None:
        super().__init__(url, rate, connections)
        self._next_key = next_key
        self._at = urlsplit(url).netloc
        self.results: list[CheckResult] = []

    def question(self) -> tuple[bytes, Any]:
        key = self._next_key()
        body = json.dumps({"path": "/item", "api_key": key})
        head = f"POST /v1/check HTTP/1.1\r\nHost: {self._at}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        return f"{head}\r\n\r\n{body}".encode(), key

    def heard(self, about: Any, at_s: float, latency_s: float, answer: Answer | None, failure: str | None) -> None:
        if answer is None:
            self.results.append(CheckResult(at_s, latency_s, about, 0, str(failure)))
            return
        error = {} if answer.status in (200, 429) else json.loads(answer.body).get("error", {})
        self.results.append(CheckResult(at_s, latency_s, about, answer.status, error.get("code", "")))


class Write(NamedTuple):
    """A key that an operator made, or tried to.

    Args:
        at_s: when it was asked for, s since the start.
        end_s: when it was answered.
        status: of HTTP; 0 where no answer came.
        key: the new one; empty where there is none.
    """

    at_s: float
    end_s: float
    status: int
    key: str


class Operator:
    """Makes one key after the other through the admin API.

    Args:
        url: of the control plane, such as `http://127.0.0.1:8082`.
        tier: of the keys.
        pause_s: between two.

    Attributes:
        writes: every attempt.
    """

    def __init__(self, url: str, tier: str, pause_s: float = 0.1) -> None:
        self._url, self._tier, self._pause_s = url, tier, pause_s
        self.writes: list[Write] = []

    async def run(self, until: asyncio.Event) -> None:
        """Write until the event is set.

        Args:
            until: ends it.
        """
        started = time.monotonic()
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=20) as client:
            while not until.is_set():
                at_s = time.monotonic() - started
                status, key = 0, ""
                try:
                    answer = await client.post("/admin/v1/api-keys", json={"tier": self._tier, "name": f"key {len(self.writes)}"})
                    status = answer.status_code
                    key = answer.json()["api_key"] if status == 201 else ""
                except httpx.TransportError:
                    pass  # no answer is a failed write
                self.writes.append(Write(at_s, time.monotonic() - started, status, key))
                await asyncio.sleep(self._pause_s)

    def away_s(self, since_s: float) -> float | None:
        """From a moment until the first write that was sent after it and succeeded.

        Args:
            since_s: the moment, s since the start.

        Returns:
            s; None where none succeeded.
        """
        # One that was under way may have been committed before; one sent later cannot.
        return next((each.end_s - since_s for each in self.writes if each.status == 201 and each.at_s >= since_s), None)

    def longest_gap_s(self, since_s: float, until_s: float) -> float:
        """The longest time without a write that succeeded.

        Args:
            since_s: the first moment, s since the start.
            until_s: the last.

        Returns:
            s.
        """
        ends = [each.end_s for each in self.writes if each.status == 201 and since_s <= each.end_s <= until_s]
        return max(after - before for before, after in pairwise([since_s, *ends, until_s]))
