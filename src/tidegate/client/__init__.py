"""A client of Tidegate's data plane: `Client` for blocking code and threads, `AsyncClient` for asyncio.

    from tidegate.client import Client
    client = Client("http://127.0.0.1:8080", on_failure="allow")
    answer = client.check("/api/v1/items", api_key="demo-free-key-0001")

On failures: each call ends within its deadline. If a server accepts no connection, the next one is used; a check that may have
been counted is never sent twice. If no server responds, `on_failure` decides, and the answer is `failed`. After several failures
a circuit breaker opens, so that an unavailable limiter does not cost the deadline of every call; later, one call at a time tries
the server again. Errors from the server (400, 401, 403, and 503 where a rule says deny) are raised, as by `Gate.check`.
API keys never appear in representations, log lines or errors.

`read_limit_headers` works for any API: it reads `RateLimit`, `X-RateLimit-*` and `Retry-After`.
"""

try:
    import httpcore as _httpcore  # noqa: F401
except ModuleNotFoundError:
    raise ImportError("tidegate.client needs httpcore, which is not installed: pip install 'tidegate[client]'") from None

from tidegate.breaker import BreakerOptions
from tidegate.client.answer import Answer
from tidegate.client.clients import AsyncClient, Client
from tidegate.client.core import OnFailure
from tidegate.client.holds import AsyncClientHold, ClientHold, HeldAnswer
from tidegate.client.limit_headers import LimitHeaders, Quota, read_limit_headers
from tidegate.client.reservations import ReservedAnswer
from tidegate.wire import LimitRequest, RuleUsageBody, UsageBody, WindowUsageBody

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncClientHold",
    "BreakerOptions",
    "Client",
    "ClientHold",
    "HeldAnswer",
    "LimitHeaders",
    "LimitRequest",
    "OnFailure",
    "Quota",
    "ReservedAnswer",
    "RuleUsageBody",
    "UsageBody",
    "WindowUsageBody",
    "read_limit_headers",
]
