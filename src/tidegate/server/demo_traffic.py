"""Example traffic of `tidegate serve --demo`, so that the console has something to show in the first minute.

It has a tier, a customer and API keys of its own: what is tried by hand is counted apart from it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Final

import msgspec

from tidegate.admin.api_keys import create_key
from tidegate.admin.customers import create_customer
from tidegate.admin.models import CustomerCreate, KeyCreate
from tidegate.admin.rules import CatalogEditor
from tidegate.decision import Check
from tidegate.errors import CatalogUnavailable, StoreUnavailable
from tidegate.gate.gate import Gate

ACTOR: Final = "demo"
TIER: Final = "shop"
CUSTOMER: Final = "acme"

_PAUSE_S: Final = 0.5
_RULES: Final = (
    {"endpoint": "/api/orders/*", "limits": ["60/minute"]},
    {"endpoint": "/api/search", "limits": ["40/minute"], "algorithm": "token_bucket"},
    {"endpoint": "/api/*", "limits": ["200/minute"]},
    {"endpoint": "/api/search", "limits": ["15/minute"], "mode": "shadow", "name": "half of the searches"},
)


class Client(msgspec.Struct, frozen=True):
    """A made-up client.

    Args:
        name: of its API key.
        paths: what it requests.
        per_s: requests per second, on average.
        customer: whose API key it is; None without a customer.
    """

    name: str
    paths: Sequence[str]
    per_s: float
    customer: str | None = None


_CLIENTS: Final = (
    Client("web shop", ("/api/orders/17", "/api/search", "/api/items/4"), 1.5),
    Client("mobile app", ("/api/search", "/api/items/8"), 0.8),
    Client("partner import", ("/api/orders/99",), 2.5, CUSTOMER),
    Client("reports", ("/api/items/1", "/api/orders/3"), 0.2, CUSTOMER),
)


async def create_callers(editor: CatalogEditor) -> Sequence[str]:
    """Create the tier with its rules, the customer, and an API key for each client, before the console is served.

    Args:
        editor: of a catalog that is deleted when the server stops.

    Returns:
        The API keys.
    """
    await editor.create_tier(ACTOR, TIER, ["50000/day"], ["100000/month"])
    for fields in _RULES:
        await editor.create_rule(ACTOR, TIER, fields)
    await create_customer(editor, ACTOR, CustomerCreate(name=CUSTOMER, tier=TIER, timezone="Europe/Berlin"))
    requests = [KeyCreate(tier=TIER, name=each.name, customer=each.customer) for each in _CLIENTS]
    return [(await create_key(editor, ACTOR, request)).api_key for request in requests]


async def generate_traffic(gate: Gate, keys: Sequence[str]) -> None:
    """Check requests of these keys until cancelled.

    Args:
        gate: whose checks they are.
        keys: what `create_callers` returned.
    """
    source = random.Random(1)
    while True:
        for client, key in zip(_CLIENTS, keys, strict=True):
            for _ in range(_whole(source, client.per_s * _PAUSE_S)):
                try:
                    await gate.check(Check.of(source.choice(client.paths), api_key=key))
                except (CatalogUnavailable, StoreUnavailable):
                    break
        await asyncio.sleep(_PAUSE_S)


def _whole(source: random.Random, count: float) -> int:
    """A whole number that is `count` on average."""
    return int(count) + (source.random() < count - int(count))
