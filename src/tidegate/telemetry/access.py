"""The access log: one line for each sampled request, with the check and its decision. Off if the sample is 0."""

from __future__ import annotations

import logging
from typing import Any

from tidegate.jitter import JITTER
from tidegate.observation import Observation
from tidegate.telemetry.requests import Request, current

logger = logging.getLogger("tidegate.access")


class AccessLog:
    """Logs a sample of the requests.

    Args:
        sample: share of the requests that are logged, 0 to 1.
    """

    def __init__(self, sample: float) -> None:
        self._sample = sample

    def is_sampled(self) -> bool:
        """Draw whether the next request is logged."""
        return JITTER.random() < self._sample

    def observe(self, observation: Observation) -> None:
        """Attach the observation to the current request if that is sampled."""
        request = current()
        if request is not None and request.sampled:
            request.observation = observation

    def write(self, request: Request, door: str, status: int | str, duration_ns: int) -> None:
        """Write the line of one answered request.

        Args:
            door: path or gRPC method of Tidegate that received it.
            status: HTTP status, or the code of a gRPC answer.
            duration_ns: from arrival to answer, ns.
        """
        fields: dict[str, Any] = {
            "event.dataset": "tidegate.access",
            "event.duration": duration_ns,
            "http.response.status_code" if isinstance(status, int) else "tidegate.grpc_answer": status,
            "tidegate.door": door,
            "tidegate.sample": self._sample,
        }
        check, observation = request.check, request.observation
        if check is not None:
            # The path that was matched, without the query, which may contain secrets.
            fields |= {"url.path": check.path, "http.request.method": check.method, "tidegate.cost": check.cost}
            if check.ip is not None:
                fields["client.ip"] = check.ip
        if observation is not None:
            decision = observation.decision
            if decision is None:
                fields |= {"event.outcome": "failure", "error.code": observation.error}
            else:
                fields |= {
                    "event.outcome": "success",
                    "tidegate.allowed": decision.allowed,
                    "tidegate.tier": decision.tier,
                    "tidegate.rule": decision.rule,
                    "tidegate.remaining": decision.remaining,
                    "tidegate.degraded": decision.degraded,
                }
                if observation.subject is not None and observation.subject.startswith("k:"):
                    fields["tidegate.key_id"] = observation.subject[2:]
        logger.info(
            "%s answered %s", door, status, extra={"ecs": {name: value for name, value in fields.items() if value is not None}}
        )
