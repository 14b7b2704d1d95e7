"""One table of cases for every door: what is asked, and what must come back, in order, on one frozen moment.

Every door starts each case with nothing consumed. `Ask` is the request, `Answer` what any door must say.
"""

from __future__ import annotations

import msgspec

FREE = "demo-free-key-0001"
TIGHT = "demo-tight-key-0001"
READER = "demo-reader-key-001"
REVOKED = "demo-revoked-key-01"
EXPIRED = "demo-expired-key-01"
OWN = "demo-own-limits-key"

POLICY = f"""
[[tiers]]
name = "free"
limits = ["20/day"]
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  limits = ["3/minute", "50/day"]
  [[tiers.rules]]
  endpoint = "/api/v1/users/{{id}}"
  limits = ["2/minute"]
  [[tiers.rules]]
  endpoint = "/login"
  methods = ["POST"]
  limits = ["2/minute"]
  subject = "ip"
  [[tiers.rules]]
  endpoint = "/everyone"
  limits = ["2/minute"]
  subject = "tier"
  [[tiers.rules]]
  endpoint = "/uploads/*"
  algorithm = "token_bucket"
  limits = ["60/minute burst 2"]
  [[tiers.rules]]
  endpoint = "/paced"
  algorithm = "leaky_bucket"
  limits = ["60/minute"]
  [[tiers.rules]]
  endpoint = "/watched"
  limits = ["1/minute"]
  mode = "shadow"

[[tiers]]
name = "tight"
limits = ["2/day"]
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["10/minute"]
  [[tiers.rules]]
  endpoint = "/api/special"
  limits = ["5/minute"]
  priority = 5
  [[tiers.rules]]
  endpoint = "/api/special"
  limits = ["1/minute"]
  methods = ["DELETE"]
  priority = 9

[[tiers]]
name = "reader"
  [[tiers.rules]]
  endpoint = "/items"
  limits = ["2/minute"]
  methods = ["GET"]
  [[tiers.rules]]
  endpoint = "/pages"
  limits = ["1/minute"]
  methods = ["GET"]
  [[tiers.rules]]
  endpoint = "/pages"
  limits = ["2/minute"]
  methods = ["HEAD"]

[[tiers]]
name = "open"
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  limits = ["1/minute"]
  subject = "ip"

[anonymous]
tier = "open"

[[access]]
action = "deny"
from = ["192.0.2.128/25", "2001:db8:bad::/48"]
[[access]]
action = "allow"
from = ["192.0.2.200"]

[[api_keys]]
key = "{FREE}"
tier = "free"
[[api_keys]]
key = "{TIGHT}"
tier = "tight"
[[api_keys]]
key = "{READER}"
tier = "reader"
[[api_keys]]
key = "{REVOKED}"
tier = "free"
status = "revoked"
[[api_keys]]
key = "{EXPIRED}"
tier = "free"
expires_at = 2020-01-01T00:00:00Z
[[api_keys]]
key = "{OWN}"
tier = "free"
  [[api_keys.overrides]]
  rule = "/api/v1/*"
  limits = ["7/minute"]
"""


class Ask(msgspec.Struct, frozen=True):
    """One request."""

    path: str
    method: str = "GET"
    api_key: str | None = FREE
    ip: str = "203.0.113.7"
    cost: int = 1


class Answer(msgspec.Struct, frozen=True):
    """What must come back; `status` as `/v1/authorize` and the middleware give it (200 stands for 204 too)."""

    status: int
    limit: int | None = None
    remaining: int | None = None
    rule: str | None = None
    tier: str | None = None
    code: str | None = None


def _allowed(limit: int, remaining: int, rule: str | None, tier: str = "free") -> Answer:
    return Answer(200, limit, remaining, rule, tier)


def _denied(limit: int, rule: str | None, tier: str = "free", remaining: int = 0) -> Answer:
    return Answer(429, limit, remaining, rule, tier)


API = "/api/v1/*"
CASES: dict[str, list[tuple[Ask, Answer]]] = {
    "counts down and denies": [
        (Ask("/api/v1/a"), _allowed(3, 2, API)),
        (Ask("/api/v1/b?page=2"), _allowed(3, 1, API)),
        (Ask("/api/v1/c", "POST"), _allowed(3, 0, API)),
        (Ask("/api/v1/d"), _denied(3, API)),
        (Ask("/api/v1/d"), _denied(3, API)),
    ],
    "HEAD is counted under GET": [
        (Ask("/items", "HEAD", READER), _allowed(2, 1, "GET /items", "reader")),
        (Ask("/items", "HEAD", READER), _allowed(2, 0, "GET /items", "reader")),
        (Ask("/items", "GET", READER), _denied(2, "GET /items", "reader")),
        (Ask("/items", "POST", READER), Answer(200, tier="reader")),
    ],
    "HEAD is its own rule's where one names it": [
        (Ask("/pages", "HEAD", READER), _allowed(2, 1, "HEAD /pages", "reader")),
        (Ask("/pages", "GET", READER), _allowed(1, 0, "GET /pages", "reader")),
        (Ask("/pages", "HEAD", READER), _allowed(2, 0, "HEAD /pages", "reader")),
        (Ask("/pages", "GET", READER), _denied(1, "GET /pages", "reader")),
    ],
    "the more specific pattern answers": [
        (Ask("/api/v1/users/42"), _allowed(2, 1, "/api/v1/users/{id}")),
        (Ask("/api/v1/users/42/posts"), _allowed(3, 2, API)),
        (Ask("/api/v1/users/43"), _allowed(2, 0, "/api/v1/users/{id}")),
        (Ask("/api/v1/users/44"), _denied(2, "/api/v1/users/{id}")),
    ],
    "priority, then methods": [
        (Ask("/api/special", "DELETE", TIGHT), _allowed(1, 0, "DELETE /api/special", "tight")),
        (Ask("/api/special", "DELETE", TIGHT), _denied(1, "DELETE /api/special", "tight")),
        (Ask("/api/special", "GET", TIGHT), Answer(200, 2, 0, "/api/special", "tight")),
    ],
    "the tier's own limit is charged with the rule's": [
        (Ask("/api/a", api_key=TIGHT), _allowed(2, 1, "/api/*", "tight")),
        (Ask("/nowhere", api_key=TIGHT), _allowed(2, 0, None, "tight")),
        (Ask("/api/a", api_key=TIGHT), _denied(2, "/api/*", "tight")),
        (Ask("/nowhere", api_key=TIGHT), _denied(2, None, "tight")),
    ],
    "by ip, whatever the key": [
        (Ask("/login", "POST", ip="198.51.100.1"), _allowed(2, 1, "POST /login")),
        (Ask("/login", "post", OWN, ip="198.51.100.1"), _allowed(2, 0, "POST /login")),
        (Ask("/login", "POST", ip="198.51.100.1"), _denied(2, "POST /login")),
        (Ask("/login", "POST", ip="198.51.100.2"), _allowed(2, 1, "POST /login")),
        (Ask("/login", "GET", ip="198.51.100.1"), _allowed(20, 17, None)),
    ],
    "an IPv6 client is its /64": [
        (Ask("/login", "POST", ip="2001:db8::1"), _allowed(2, 1, "POST /login")),
        (Ask("/login", "POST", ip="2001:db8:0:0:ffff::2"), _allowed(2, 0, "POST /login")),
        (Ask("/login", "POST", ip="2001:db8::3"), _denied(2, "POST /login")),
        (Ask("/login", "POST", ip="2001:db8:0:1::1"), _allowed(2, 1, "POST /login")),
        (Ask("/login", "POST", ip="::ffff:192.0.2.1"), _allowed(2, 1, "POST /login")),
        (Ask("/login", "POST", ip="192.0.2.1"), _allowed(2, 0, "POST /login")),
    ],
    "by tier, all keys together": [
        (Ask("/everyone"), _allowed(2, 1, "/everyone")),
        (Ask("/everyone", api_key=OWN), _allowed(2, 0, "/everyone")),
        (Ask("/everyone"), _denied(2, "/everyone")),
    ],
    "token bucket": [
        (Ask("/uploads/1", "PUT"), _allowed(2, 1, "/uploads/*")),
        (Ask("/uploads/1", "PUT"), _allowed(2, 0, "/uploads/*")),
        (Ask("/uploads/1", "PUT"), _denied(2, "/uploads/*")),
    ],
    "leaky bucket paces": [
        (Ask("/paced"), _allowed(1, 0, "/paced")),
        (Ask("/paced"), _denied(1, "/paced")),
    ],
    "a shadow rule never blocks": [
        (Ask("/watched"), _allowed(20, 19, None)),
        (Ask("/watched"), _allowed(20, 18, None)),
        (Ask("/watched"), _allowed(20, 17, None)),
    ],
    "a key with limits of its own": [
        (Ask("/api/v1/a", api_key=OWN), _allowed(7, 6, API)),
        (Ask("/api/v1/a", api_key=OWN), _allowed(7, 5, API)),
        (Ask("/api/v1/a"), _allowed(3, 2, API)),
    ],
    "anonymous callers are counted by ip": [
        (Ask("/api/v1/a", api_key=None, ip="198.51.100.1"), _allowed(1, 0, API, "open")),
        (Ask("/api/v1/a", api_key=None, ip="198.51.100.1"), _denied(1, API, "open")),
        (Ask("/api/v1/a", api_key=None, ip="198.51.100.2"), _allowed(1, 0, API, "open")),
        (Ask("/elsewhere", api_key=None), Answer(200, tier="open")),
    ],
    "cost": [
        (Ask("/api/v1/a", cost=2), _allowed(3, 1, API)),
        (Ask("/api/v1/a", cost=2), _denied(3, API, remaining=1)),
        (Ask("/api/v1/a", cost=0), _allowed(3, 1, API)),
        (Ask("/api/v1/a", cost=1), _allowed(3, 0, API)),
        (Ask("/api/v1/a", cost=0), _allowed(3, 0, API)),
        (Ask("/api/v1/a", cost=4), _denied(3, API)),
    ],
    "keys that are not let in": [
        (Ask("/api/v1/a", api_key="nobody-knows-this-key"), Answer(401, code="INVALID_API_KEY")),
        (Ask("/api/v1/a", api_key="tg_mistyped"), Answer(401, code="INVALID_API_KEY")),
        (Ask("/api/v1/a", api_key="short"), Answer(401, code="INVALID_API_KEY")),
        (Ask("/api/v1/a", api_key=REVOKED), Answer(403, code="API_KEY_REVOKED")),
        (Ask("/api/v1/a", api_key=EXPIRED), Answer(403, code="API_KEY_EXPIRED")),
        (Ask("/api/v1/a"), _allowed(3, 2, API)),
    ],
    "denied and allowed addresses": [
        (Ask("/api/v1/a", ip="192.0.2.129"), Answer(403, code="BLOCKED")),
        (Ask("/api/v1/a", api_key=None, ip="2001:db8:bad::1"), Answer(403, code="BLOCKED")),
        *((Ask("/api/v1/a", ip="192.0.2.200"), Answer(200, tier="free")) for _ in range(4)),
        (Ask("/api/v1/a", api_key="nobody-knows-this-key", ip="192.0.2.200"), Answer(401, code="INVALID_API_KEY")),
        (Ask("/api/v1/a"), _allowed(3, 2, API)),
    ],
    "other spellings of a path are refused and charge nothing": [
        *(
            (Ask(path), Answer(400, code="BAD_REQUEST"))
            for path in (
                "/%61pi/v1/a",
                "//api/v1/a",
                "/api//v1/a",
                "/api/v1/../v1/a",
                "/api/./v1/a",
                "/api/v1/a;x=1",
                "/api%2Fv1/a",
                "/api/v1/a%00",
                "/api/v1/%5Ca",
            )
        ),
        (Ask("/api/v1/a"), _allowed(3, 2, API)),
        (Ask("/api/v1/caf%c3%a9"), _allowed(3, 1, API)),
    ],
}
