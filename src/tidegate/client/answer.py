"""What a client gives back for a check: what the limiter decided, or what holds while it cannot be heard."""

from __future__ import annotations

from tidegate.client.limit_headers import Quota, read_limit_headers
from tidegate.wire import DecisionBody


class Answer(DecisionBody, frozen=True, gc=False, kw_only=True):
    """A decision, with the fields of `POST /v1/check`, and how it came about.

    Args:
        failure: why the limiter was not heard, so that `on_failure` decided; None where the limiter did.
        headers: the limit headers of the limiter's answer, names in lower case, to be given to the end client; none in a batch.
    """

    failure: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def failed(self) -> bool:
        """Whether `on_failure` decided, not the limiter. Such an answer is `degraded` too."""
        return self.failure is not None

    @property
    def status(self) -> int:
        """HTTP status for the end client: 200, 429, or 503 where it is denied because the limiter was not heard."""
        return 200 if self.allowed else 503 if self.failed else 429

    @property
    def quotas(self) -> tuple[Quota, ...]:
        """All limits that hold, from the headers; read anew each time."""
        return read_limit_headers(self.headers).quotas
