"""The public names of the client."""

from __future__ import annotations

from tidegate import client


def test_public_names() -> None:
    """What others build on: change it only by adding."""
    assert sorted(client.__all__) == list(client.__all__)
    assert set(client.__all__) == {
        *(
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
        ),
        "read_limit_headers",
    }
    assert all(hasattr(client, name) for name in client.__all__)
