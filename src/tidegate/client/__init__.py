"""A client of Tidegate's data plane: `Client` for blocking code and threads, `AsyncClient` for asyncio.

    from tidegate.client import Client
    client = Client("http://127.0.0.1:8080", on_failure="allow")
    answer = client.check("/api/v1/items", api_key="demo-free-key-0001")

When things fail: each call ends within its deadline. A server that takes no connection is passed over for the next one; a check
that may have been counted is never asked twice. When nobody is heard, `on_failure` decides, and the answer is `failed`. After
some failures a breaker leaves a server alone, so that a dead limiter does not cost the deadline for each request; one call at a
time tries it again. What the server refuses (400, 401, 403, and 503 where a rule says deny) is raised, as by `Gate.check`.
No API key stands in a representation, a log line or an error.

`read_limit_headers` is for who asks any API: it reads what `RateLimit`, `X-RateLimit-*` and `Retry-After` say.
"""

try:
    import httpcore as _httpcore  # noqa: F401
except ModuleNotFoundError:
    raise ImportError("tidegate.client needs httpcore, which is not installed: pip install 'tidegate[client]'") from None

from tidegate.breaker import BreakerOptions
from tidegate.client.answer import Answer
from tidegate.client.clients import AsyncClient, Client
from tidegate.client.core import OnFailure
from tidegate.client.limit_headers import LimitHeaders, Quota, read_limit_headers
from tidegate.wire import RuleUsageBody, UsageBody, WindowUsageBody

__all__ = [
    "Answer",
    "AsyncClient",
    "BreakerOptions",
    "Client",
    "LimitHeaders",
    "OnFailure",
    "Quota",
    "RuleUsageBody",
    "UsageBody",
    "WindowUsageBody",
    "read_limit_headers",
]
