"""A configuration of envoyproxy/ratelimit, and what that program answers: the same table runs against it and against Tidegate.

Where the two differ, `OURS` says so; it has one entry for each difference that docs/envoy.md tells.
"""

from __future__ import annotations

import msgspec

DOMAIN = "peer"
CONFIG = """\
# comments stay
domain: peer
descriptors:
  - key: database
    value: users
    rate_limit:
      unit: hour
      requests_per_unit: 3
  - key: database
    value: default
    rate_limit: {unit: DAY, requests_per_unit: 2}
  - key: to_number
    rate_limit:
      unit: week
      requests_per_unit: 2
  - key: message_type
    value: marketing
    descriptors:
      - key: to_number
        rate_limit: {unit: month, requests_per_unit: 1}
      - key: to_number
        value: "42"
        rate_limit: {unit: year, requests_per_unit: 3}
  - key: path
    value: /files/*
    rate_limit: {unit: hour, requests_per_unit: 2}
  - key: path
    value: /files/deep/*
    rate_limit: {unit: hour, requests_per_unit: 9}
  - key: inner
    value: /api/*/items
    rate_limit: {unit: hour, requests_per_unit: 2}
  - key: inner
    value: /api/*/*
    rate_limit: {unit: hour, requests_per_unit: 9}
  - key: inner
    value: "*.json"
    share_threshold: true
    rate_limit: {unit: hour, requests_per_unit: 3}
  - {key: text, value: x*, rate_limit: {unit: hour, requests_per_unit: 9}}
  - {key: text, value: x*y, rate_limit: {unit: hour, requests_per_unit: 3}}
  - {key: text, value: z*, share_threshold: true, rate_limit: {unit: hour, requests_per_unit: 3}}
  - key: several
    value: foo*bar*baz
    share_threshold: true
    rate_limit: &two {unit: hour, requests_per_unit: 2}
  - key: merged
    rate_limit: {<<: *two, requests_per_unit: 1_000}
    metadata: {team: {name: one}}
  - key: shared
    value: a*
    share_threshold: true
    rate_limit: {unit: hour, requests_per_unit: 2}
    descriptors:
      - key: user
        rate_limit: {unit: hour, requests_per_unit: 2}
  - key: banned
    rate_limit: {unit: hour, requests_per_unit: 0}
  - key: watched
    shadow_mode: true
    rate_limit: {unit: hour, requests_per_unit: 1}
  - key: sold
    quota_mode: true
    rate_limit: {unit: hour, requests_per_unit: 3}
  - key: sold_none
    quota_mode: true
    rate_limit: {unit: hour, requests_per_unit: 0}
  - key: free
    rate_limit: {unlimited: true}
  - key: category
    value: read
    rate_limit: {name: reads, unit: hour, requests_per_unit: 2}
  - key: endpoint
    value: /heavy
    detailed_metric: true
    rate_limit:
      unit: hour
      requests_per_unit: 5
      replaces: [{name: reads}, {name: nobody}]
  - key: nested
    descriptors:
      - key: only
        rate_limit: {unit: hour, requests_per_unit: 1}
  - key: hits
    value_to_metric: true
    rate_limit: {unit: hour, requests_per_unit: 10}
"""

OK, OVER = 1, 2
MAX = 2**32 - 1
Entries = tuple[tuple[str, str], ...]


class Step(msgspec.Struct, frozen=True):
    """One request, and what comes back.

    Args:
        descriptors: of the request.
        code: overall.
        statuses: code and what is left, of each descriptor.
        hits: of the request, 0 where not given.
        own_hits: of each descriptor.
        limit: requests and unit of the first status, where they are to be looked at.
        over: numbers of the descriptors that are over a limit in quota mode.
    """

    descriptors: tuple[Entries, ...]
    code: int
    statuses: tuple[tuple[int, int], ...]
    hits: int = 0
    own_hits: tuple[int | None, ...] = ()
    limit: tuple[int, int] | None = None
    over: tuple[int, ...] = ()


def _one(*entries: tuple[str, str], code: int = OK, left: int = 0, **more: object) -> Step:
    return Step((entries,), code, ((code, left),), **more)  # type: ignore[arg-type]


STEPS: dict[str, tuple[Step, ...]] = {
    "a value": (
        _one(("database", "users"), left=2, limit=(3, 3)),
        _one(("database", "users"), left=1),
        _one(("database", "users"), left=0),
        _one(("database", "users"), code=OVER, left=0, limit=(3, 3)),
        _one(("database", "default"), left=1, limit=(2, 4)),
        _one(("database", "other")),
    ),
    "a key alone counts each value": (
        _one(("to_number", "1"), left=1, limit=(2, 7)),
        _one(("to_number", "2"), left=1),
        _one(("to_number", "1"), left=0),
        _one(("to_number", "1"), code=OVER),
        _one(("to_number", ""), left=1),
    ),
    "nested": (
        _one(("message_type", "marketing"), ("to_number", "1"), left=0, limit=(1, 5)),
        _one(("message_type", "marketing"), ("to_number", "1"), code=OVER),
        _one(("message_type", "marketing"), ("to_number", "42"), left=2, limit=(3, 6)),
        _one(("message_type", "marketing")),
        _one(("message_type", "other"), ("to_number", "1")),
        _one(("to_number", "7"), ("more", "x")),
        _one(("nested", "x")),
        _one(("nested", "x"), ("only", "y"), left=0),
        _one(("nested", "x"), ("only", "y"), code=OVER),
        _one(("nested", "z"), ("only", "y"), left=0),
    ),
    "wildcards: the first in the file, each value for itself": (
        _one(("path", "/files/a"), left=1, limit=(2, 3)),
        _one(("path", "/files/b"), left=1),
        _one(("path", "/files/deep/a"), left=1, limit=(2, 3)),
        _one(("path", "/other")),
        _one(
            ("path", "/files"),
        ),
    ),
    "wildcards anywhere in a value": (
        _one(("inner", "/api/7/items"), left=1, limit=(2, 3)),
        _one(("inner", "/api//items"), left=1),
        _one(("inner", "/api/7/items"), left=0),
        _one(("inner", "/api/7/items"), code=OVER),
        _one(("inner", "/api/7/items/8"), left=8, limit=(9, 3)),
        _one(("inner", "/api/items")),
        _one(("inner", "a.json"), left=2),
        _one(("inner", "b.json"), left=1),
        _one(("inner", "/api/7/c.json"), left=8),
        _one(("inner", ".json"), left=0),
        _one(("inner", "a.json"), code=OVER),
        _one(("several", "foo1bar2baz"), left=1),
        _one(("several", "foobarbaz"), left=0),
        _one(("several", "foobarbarbaz"), code=OVER),
        _one(("several", "foobaz")),
        _one(("several", "foobarba")),
        _one(("several", "xfoobarbaz")),
        _one(("several", "foobazbar")),
    ),
    "a value that is the text of a wildcard": (
        _one(("text", "x*y"), left=2, limit=(3, 3)),
        _one(("text", "x-y"), left=8, limit=(9, 3)),
        _one(("text", "z*"), left=2, limit=(3, 3)),
        _one(("text", "z-"), left=1),
    ),
    "merge keys and underscores": (_one(("merged", "x"), left=999, limit=(1000, 3)),),
    "wildcards whose values share": (
        _one(("shared", "a1"), left=1),
        _one(("shared", "a2"), left=0),
        _one(("shared", "a3"), code=OVER),
        _one(("shared", "a1"), ("user", "u"), left=1),
        _one(("shared", "a2"), ("user", "u"), left=0),
        _one(("shared", "a2"), ("user", "v"), left=1),
        _one(("shared", "b")),
    ),
    "0, shadow, unlimited": (
        _one(("banned", "x"), code=OVER, limit=(0, 3)),
        _one(("watched", "x"), left=0, limit=(1, 3)),
        _one(("watched", "x"), left=0),
        _one(("free", "x"), left=MAX),
        _one(("unknown", "x")),
    ),
    "quota mode: passes, and what is over is counted up to the limit": (
        _one(("sold", "x"), left=1, hits=2),
        _one(("sold", "x"), left=0, hits=2, over=(0,)),
        _one(("sold", "x"), left=0, over=(0,), limit=(3, 3)),
        _one(("sold_none", "x"), left=0, over=(0,), limit=(0, 3)),
        Step(((("free", "x"),), (("sold", "x"),)), OK, ((OK, MAX), (OK, 0)), over=(1,)),
        Step(((("banned", "x"),), (("sold", "x"),)), OVER, ((OVER, 0), (OK, 0)), over=(1,)),
    ),
    "replaces": (
        Step(((("category", "read"),), (("endpoint", "/heavy"),)), OK, ((OK, 0), (OK, 4))),
        _one(("category", "read"), left=1),
        Step(((("category", "read"),), (("endpoint", "/light"),)), OK, ((OK, 0), (OK, 0))),
        Step(((("category", "read"),), (("endpoint", "/heavy"),)), OK, ((OK, 0), (OK, 3))),
        Step(((("category", "read"),), (("endpoint", "/light"),)), OVER, ((OVER, 0), (OK, 0))),
    ),
    "several descriptors are counted each on its own, also when the request is denied": (
        Step(((("banned", "x"),), (("to_number", "several"),)), OVER, ((OVER, 0), (OK, 1))),
        Step(((("banned", "x"),), (("to_number", "several"),)), OVER, ((OVER, 0), (OK, 0))),
        Step(((("banned", "x"),), (("to_number", "several"),)), OVER, ((OVER, 0), (OVER, 0))),
    ),
    "hits": (
        _one(("hits", "a"), left=7, hits=3),
        _one(("hits", "a"), left=5, hits=9, own_hits=(2,)),
        _one(("hits", "a"), left=5, own_hits=(0,)),
        _one(("hits", "a"), code=OVER, left=0, hits=6),
        _one(("hits", "a"), code=OVER, left=0),
        _one(("hits", "a"), code=OVER, left=0, own_hits=(0,)),
    ),
    "hits that do not fit take what is left": (
        _one(("hits", "part"), left=2, hits=8),
        _one(("hits", "part"), code=OVER, left=0, hits=5),
        _one(("hits", "part"), code=OVER, left=0),
    ),
    "a value that looks like the entries' own signs": (
        _one(("hits", "a&hits=b"), left=9),
        _one(("hits", "a%26hits%3Db"), left=9),
        _one(("hits", "x" * 5000), left=9),
        _one(("hits", "x" * 5001), left=9),
        _one(("hits", "x" * 5000), left=8),
    ),
}

OURS: dict[str, tuple[Step, ...]] = {
    # There: OK until something more was asked for. Here a look says what the next request will be told.
    "a look where exactly nothing is left": (
        _one(("hits", "exact"), left=0, hits=10),
        _one(("hits", "exact"), code=OVER, left=0, own_hits=(0,)),
    ),
}
