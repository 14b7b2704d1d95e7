"""The access log: a sample of the requests, each with what was asked and what was decided. Off where the sample is 0."""

from __future__ import annotations

import logging
import random
from typing import Any

from tidegate.decision import Observation
from tidegate.telemetry.requests import Request, current

logger = logging.getLogger("tidegate.access")


class AccessLog:
    """Writes a line about some requests.

    Args:
        sample: which share of them, 0 to 1.
    """

    def __init__(self, sample: float) -> None:
        self._sample = sample

    def wants(self) -> bool:
        """Whether the request that came now is among them."""
        return random.random() < self._sample

    def observe(self, seen: Observation) -> None:
        """Keep what the gate saw of a request that is wanted.

        Args:
            seen: what it saw.
        """
        request = current()
        if request is not None and request.wanted:
            request.seen = seen

    def write(self, request: Request, door: str, status: int | str, duration_ns: int) -> None:
        """Write the line.

        Args:
            request: that was answered.
            door: path of Tidegate's own that it came to.
            status: of the answer: HTTP's number, or what a call of gRPC said.
            duration_ns: from its arrival to its answer, ns.
        """
        told: dict[str, Any] = {
            "event.dataset": "tidegate.access",
            "event.duration": duration_ns,
            "http.response.status_code" if isinstance(status, int) else "tidegate.grpc_answer": status,
            "tidegate.door": door,
            "tidegate.sample": self._sample,
        }
        check, seen = request.check, request.seen
        if check is not None:
            # The path as it was decided on: without a query, which may hold anything.
            told |= {"url.path": check.path, "http.request.method": check.method, "tidegate.cost": check.cost}
            if check.ip is not None:
                told["client.ip"] = check.ip
        if seen is not None:
            decision = seen.decision
            if decision is None:
                told |= {"event.outcome": "failure", "error.code": seen.error}
            else:
                told |= {
                    "event.outcome": "success",
                    "tidegate.allowed": decision.allowed,
                    "tidegate.tier": decision.tier,
                    "tidegate.rule": decision.rule,
                    "tidegate.remaining": decision.remaining,
                    "tidegate.degraded": decision.degraded,
                }
                if seen.subject is not None and seen.subject.startswith("k:"):
                    told["tidegate.key_id"] = seen.subject[2:]
        logger.info(
            "%s answered %s", door, status, extra={"ecs": {name: each for name, each in told.items() if each is not None}}
        )
