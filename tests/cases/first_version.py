"""What the first version of Tidegate does to its database, revision 0001, statement by statement, and what its rows mean.

Written out as its driver sends it, so that it stays what it was. JSON and booleans are spelled as both databases take them.
"""

from __future__ import annotations

from typing import Final

from tidegate.policy.limits import Limit
from tidegate.policy.model import ApiKey, KeyStatus, Tier
from tidegate.policy.overrides import Override
from tidegate.policy.rules import Rule

REVISION: Final = "0001"

ROWS: Final = (
    "INSERT INTO tiers (name, limits, managed_by_file) VALUES ('free', '[\"20000/day\"]', true), ('own', '[]', false)",
    """INSERT INTO rate_limit_rules (tier_id, name, endpoint_pattern, methods, algorithm, limits, subject, priority, mode,
        on_failure, position, managed_by_file) VALUES
        (1, 'reads', '/api/v1/*', '["GET", "POST"]', 'token_bucket', '["100/minute burst 20"]', 'ip', 10, 'shadow', 'deny', 0,
            true),
        (1, '/x', '/x', '[]', 'sliding_window', '["5/second", "100/day"]', 'api_key', 0, 'enforce', 'default', 1, true),
        (1, 'DELETE /%C3%A9/{id}', '/%C3%A9/{id}', '["DELETE"]', 'leaky_bucket', '["1/second burst 3"]', 'api_key', -1000000,
            'enforce', 'allow', 2, true),
        (2, 'l', '/l', '[]', 'sliding_log', '["7/hour"]', 'tier', 1000000, 'enforce', 'local', 0, false),
        (2, 'f', '/f', '[]', 'fixed_window', '["9/month"]', 'api_key', 0, 'enforce', 'default', 1, false)""",
    f"""INSERT INTO api_keys (id, sha256, tier_id, name, status, expires_at_us, overrides, created_at_us, revoked_at_us,
        revoked_reason, managed_by_file) VALUES
        ('{"a" * 24}', '{"a" * 64}', 1, '', 'active', NULL, '[]', 1700000000000001, NULL, NULL, true),
        ('{"b" * 24}', '{"b" * 64}', 1, 'of the file', 'revoked', 1893549845000000,
            '[{{"rule": "", "limits": ["90000/day"]}}, {{"rule": "/x", "limits": ["50/second", "60/minute"]}}]',
            1700000000000002, NULL, NULL, true),
        ('{"c" * 24}', '{"c" * 64}', 2, 'Åsa ''; DROP 😀', 'active', 1700000000000009, '[]', 1700000000000003, NULL, NULL, false),
        ('{"d" * 24}', '{"d" * 64}', 2, '{"n" * 200}', 'revoked', NULL, '[{{"rule": "f", "limits": ["1/second"]}}]',
            1700000000000004, 1700000000000005, 'leaked: "x"', false)""",
    """UPDATE policy_state SET version = 7, anonymous_tier = 'free', file_digest = 'digest of the file',
        changed_at_us = 1700000000000006""",
)
"""Rows of every shape. They go into an empty database, where the tiers get the ids 1 and 2."""


def _limits(*texts: str) -> tuple[Limit, ...]:
    return tuple(Limit.parse(text) for text in texts)


TIERS: Final = [
    Tier(
        "free",
        (
            Rule.make("/api/v1/*", ["100/minute burst 20"], ["GET", "POST"], "token_bucket", "ip", 10, "shadow", "deny", "reads"),
            Rule.make("/x", ["5/second", "100/day"]),
            Rule.make("/%C3%A9/{id}", ["1/second burst 3"], ["DELETE"], "leaky_bucket", priority=-1_000_000, on_failure="allow"),
        ),
        _limits("20000/day"),
        managed_by_file=True,
    ),
    Tier(
        "own",
        (
            Rule.make("/l", ["7/hour"], (), "sliding_log", "tier", 1_000_000, on_failure="local", name="l"),
            Rule.make("/f", ["9/month"], (), "fixed_window", name="f"),
        ),
    ),
]
KEYS: Final = [
    ApiKey("a" * 64, "free", managed_by_file=True),
    ApiKey(
        "b" * 64,
        "free",
        KeyStatus.REVOKED,
        "of the file",
        1_893_549_845_000_000,
        (Override("", _limits("90000/day")), Override("/x", _limits("50/second", "60/minute"))),
        managed_by_file=True,
    ),
    ApiKey("c" * 64, "own", name="Åsa '; DROP 😀", expires_at_us=1_700_000_000_000_009),
    ApiKey("d" * 64, "own", KeyStatus.REVOKED, "n" * 200, overrides=(Override("f", _limits("1/second")),)),
]
VERSION: Final = 7
ANONYMOUS: Final = "free"
DIGEST: Final = "digest of the file"

TAKE_TURN: Final = "UPDATE policy_state SET version=(policy_state.version + 1), changed_at_us=1700000000000007"
"""The first statement of each of its changes."""
CHANGES: Final = (
    "INSERT INTO tiers (name, limits, managed_by_file) VALUES ('old-{n}', '[]', true) RETURNING tiers.id",
    """INSERT INTO rate_limit_rules (tier_id, name, endpoint_pattern, methods, algorithm, limits, subject, priority, mode,
        on_failure, position, managed_by_file) SELECT id, '/old', '/old', '[]', 'sliding_window', '["5/second"]', 'api_key', 0,
        'enforce', 'default', 0, true FROM tiers WHERE name = 'old-{n}'""",
    """INSERT INTO api_keys (id, sha256, tier_id, name, status, expires_at_us, overrides, created_at_us, managed_by_file)
        SELECT '{n:024x}', '{n:064x}', id, 'old {n}', 'active', NULL, '[]', 1700000000000008, false FROM tiers
        WHERE name = 'old-{n}'""",
    """UPDATE api_keys SET status='revoked', revoked_at_us=1700000000000009, revoked_reason='old' WHERE api_keys.id = '{n:024x}'
        AND {n} % 2 = 0""",
    """UPDATE rate_limit_rules SET limits='["6/second"]', managed_by_file=true WHERE rate_limit_rules.name = '/old'
        AND rate_limit_rules.tier_id = (SELECT id FROM tiers WHERE name = 'old-{n}')""",
    "UPDATE policy_state SET anonymous_tier='old-{n}', file_digest='digest {n}'",
)
"""What it does within one change, for a number."""
READS: Final = (
    "SELECT policy_state.version FROM policy_state",
    "SELECT policy_state.anonymous_tier FROM policy_state",
    "SELECT policy_state.file_digest FROM policy_state",
    "SELECT tiers.id, tiers.name, tiers.limits, tiers.managed_by_file FROM tiers WHERE tiers.name = 'old-{n}'",
    """SELECT rate_limit_rules.id, rate_limit_rules.tier_id, rate_limit_rules.name, rate_limit_rules.endpoint_pattern,
        rate_limit_rules.methods, rate_limit_rules.algorithm, rate_limit_rules.limits, rate_limit_rules.subject,
        rate_limit_rules.priority, rate_limit_rules.mode, rate_limit_rules.on_failure, rate_limit_rules.position,
        rate_limit_rules.managed_by_file FROM rate_limit_rules JOIN tiers ON tiers.id = rate_limit_rules.tier_id
        WHERE tiers.name = 'old-{n}' ORDER BY rate_limit_rules.position, rate_limit_rules.id""",
    """SELECT api_keys.id, api_keys.sha256, api_keys.tier_id, api_keys.name, api_keys.status, api_keys.expires_at_us,
        api_keys.overrides, api_keys.created_at_us, api_keys.revoked_at_us, api_keys.revoked_reason, api_keys.managed_by_file,
        tiers.name AS tier_name FROM api_keys JOIN tiers ON tiers.id = api_keys.tier_id WHERE api_keys.sha256 = '{n:064x}'""",
    """SELECT api_keys.id, tiers.name AS tier_name FROM api_keys JOIN tiers ON tiers.id = api_keys.tier_id
        WHERE api_keys.managed_by_file ORDER BY api_keys.id LIMIT 100""",
)
"""What it reads. All but the last find what it wrote itself."""
