"""Result of a client's check: the decision of the limiter, or of `on_failure` while no server is available."""

from __future__ import annotations

from tidegate.client.limit_headers import Quota, read_limit_headers
from tidegate.wire import DecisionBody


class Answer(DecisionBody, frozen=True, gc=False, kw_only=True):
    """A decision with the fields of `POST /v1/check`.

    Args:
        failure: why no server decided, so that `on_failure` did; None if a server decided.
        headers: limit headers of the server's response, names in lower case, to pass on to the end client; empty in a batch.
    """

    failure: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def failed(self) -> bool:
        """Whether `on_failure` decided instead of a server. Such an answer is also `degraded`."""
        return self.failure is not None

    @property
    def status(self) -> int:
        """HTTP status for the end client: 200, 429, or 503 if denied because no server was available."""
        return 200 if self.allowed else 503 if self.failed else 429

    @property
    def quotas(self) -> tuple[Quota, ...]:
        """All limits in the headers; parsed on each access."""
        return read_limit_headers(self.headers).quotas
