"""The catalog's tables, in SQLAlchemy Core: one schema for SQLite and PostgreSQL.

Times are µs since the epoch (UTC). Limits are kept as the texts that a policy writes. Rows with `managed_by_file` belong to
the policy file. `revision` grows with every change of its row: who edits says which one was seen.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

# A name for every constraint, so that a migration can drop it by name on any database.
metadata: Final = MetaData(
    naming_convention={
        "ix": "idx_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite assigns ids only to a column of the exact type INTEGER.
_RowId: Final = BigInteger().with_variant(Integer, "sqlite")

tiers: Final = Table(
    "tiers",
    metadata,
    Column("id", _RowId, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False),
    Column("limits", JSON, nullable=False),
    Column("managed_by_file", Boolean, nullable=False, default=False),
    Column("revision", BigInteger, nullable=False, server_default="1"),
    # NULL where it has none.
    Column("quotas", JSON(none_as_null=True), nullable=True),
    Column("overage", JSON(none_as_null=True), nullable=True),
    UniqueConstraint("name"),
)

# Other limits for some subjects of a tier's rules: see `override_rows`.
subject_overrides: Final = Table(
    "subject_overrides",
    metadata,
    Column("tier_id", _RowId, ForeignKey("tiers.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("entries", JSON, nullable=False),
)

rate_limit_rules: Final = Table(
    "rate_limit_rules",
    metadata,
    Column("id", _RowId, primary_key=True, autoincrement=True),
    Column("tier_id", _RowId, ForeignKey("tiers.id", ondelete="CASCADE"), nullable=False),
    Column("name", String(256), nullable=False),
    Column("endpoint_pattern", String(1024), nullable=False),
    Column("methods", JSON, nullable=False),
    Column("algorithm", String(32), nullable=False),
    Column("limits", JSON, nullable=False),
    Column("subject", String(16), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("mode", String(16), nullable=False),
    Column("on_failure", String(16), nullable=False),
    Column("position", Integer, nullable=False),
    Column("managed_by_file", Boolean, nullable=False, default=False),
    Column("revision", BigInteger, nullable=False, server_default="1"),
    # NULL where the rule has none: so all rows were before there were attributes.
    Column("match_attributes", JSON(none_as_null=True), nullable=True),
    Column("subject_attributes", JSON(none_as_null=True), nullable=True),
    Column("on_missing", String(16), nullable=True),
    # NULL: they may be leased.
    Column("leases", Boolean, nullable=True),
    Column("action", String(16), nullable=True),
    # NULL: it counts requests.
    Column("failures", JSON(none_as_null=True), nullable=True),
    Column("quotas", JSON(none_as_null=True), nullable=True),
    Column("overage", JSON(none_as_null=True), nullable=True),
    UniqueConstraint("tier_id", "name"),
    Index("idx_rules_tier_endpoint", "tier_id", "endpoint_pattern"),
    Index("idx_rules_tier_id", "tier_id", "id"),
)

api_keys: Final = Table(
    "api_keys",
    metadata,
    # The first 24 hex digits of the digest: the same on every instance, and long enough to be unique.
    Column("id", String(24), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("tier_id", _RowId, ForeignKey("tiers.id"), nullable=False),
    Column("name", String(200), nullable=False),
    Column("status", String(16), nullable=False),
    Column("expires_at_us", BigInteger, nullable=True),
    Column("overrides", JSON, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("revoked_at_us", BigInteger, nullable=True),
    Column("revoked_reason", String(1000), nullable=True),
    Column("managed_by_file", Boolean, nullable=False, default=False),
    Column("revision", BigInteger, nullable=False, server_default="1"),
    # Id of the first key of the chain of rotations: a rotated key keeps its counters.
    Column("counts_as", String(24), nullable=True),
    # Its customer; with `inherits_tier` the tier is a copy of the customer's.
    Column("customer_id", _RowId, nullable=True),
    Column("inherits_tier", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("sha256"),
    Index(
        "idx_api_keys_customer_id",
        "customer_id",
        "id",
        sqlite_where=text("customer_id IS NOT NULL"),
        postgresql_where=text("customer_id IS NOT NULL"),
    ),
    Index("idx_api_keys_tier_id", "tier_id", "id"),
    Index("idx_api_keys_status", "status", sqlite_where=text("status = 'active'"), postgresql_where=text("status = 'active'")),
    # Few keys are in these states, and no other index finds a page of few among many.
    Index("idx_api_keys_revoked", "id", sqlite_where=text("status = 'revoked'"), postgresql_where=text("status = 'revoked'")),
    Index(
        "idx_api_keys_expires",
        "expires_at_us",
        sqlite_where=text("expires_at_us IS NOT NULL"),
        postgresql_where=text("expires_at_us IS NOT NULL"),
    ),
    Index("idx_api_keys_file", "id", sqlite_where=text("managed_by_file = 1"), postgresql_where=text("managed_by_file")),
)

# Who owns API keys and attribute values.
customers: Final = Table(
    "customers",
    metadata,
    Column("id", _RowId, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False),
    Column("external_id", String(200), nullable=True),
    Column("tier_id", _RowId, ForeignKey("tiers.id"), nullable=True),
    # As texts, empty without one.
    Column("anchor", String(10), nullable=False),
    Column("timezone", String(64), nullable=False),
    Column("metadata", Text, nullable=False),
    Column("match_attributes", JSON(none_as_null=True), nullable=True),
    Column("overrides", JSON, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("managed_by_file", Boolean, nullable=False),
    Column("revision", BigInteger, nullable=False, server_default="1"),
    UniqueConstraint("name"),
    UniqueConstraint("external_id"),
    Index("idx_customers_tier_id", "tier_id"),
)

# Each attribute value of a customer, by its digest.
customer_values: Final = Table(
    "customer_values",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("customer_id", _RowId, nullable=False),
    Column("attribute", String(32), nullable=False),
    Index("idx_customer_values_customer_id", "customer_id"),
    Index("idx_customer_values_attribute", "attribute"),
)

policy_state: Final = Table(
    "policy_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
    Column("anonymous_tier", String(64), nullable=True),
    Column("file_digest", String(64), nullable=True),
    Column("changed_at_us", BigInteger, nullable=False),
    # The previous version, so that a change without a row in `catalog_changes` is detected.
    Column("previous", BigInteger, nullable=True),
    # The oldest schema revision whose Tidegate works with this schema: raised by migrations that remove something.
    Column("runs_from", String(16), nullable=False, server_default="0001"),
    # The secret that seals entries of the shared cache unless the settings have one; created when it is first needed.
    Column("cache_secret", String(64), nullable=True),
    # How API keys were hashed: `hmac-sha256:` and a digest of the pepper; NULL for SHA-256.
    Column("key_hash", String(40), nullable=True),
    # The tables [attributes], [callers], [jwt], [[namespaces]] and [[access]] of a policy; NULL without them.
    Column("attributes", JSON(none_as_null=True), nullable=True),
    Column("callers", JSON(none_as_null=True), nullable=True),
    Column("jwt", JSON(none_as_null=True), nullable=True),
    Column("namespaces", JSON(none_as_null=True), nullable=True),
    Column("access", JSON(none_as_null=True), nullable=True),
    # The attributes by whose values callers may be a customer's; NULL without any.
    Column("customer_attributes", JSON(none_as_null=True), nullable=True),
    # The tables [[notify]]; NULL without them. Secrets are environment variables, of which only the name is here.
    Column("notify", JSON(none_as_null=True), nullable=True),
    CheckConstraint("id = 1", name="single_row"),
)

# The items touched by each version; see `change_log`.
catalog_changes: Final = Table(
    "catalog_changes",
    metadata,
    Column("version", BigInteger, nullable=False, autoincrement=False),
    Column("previous", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("name", String(64), nullable=False),
    PrimaryKeyConstraint("version", "kind", "name"),
)


def _rule() -> tuple[Column[str], Column[str]]:
    return Column("tier", String(64), nullable=False), Column("rule", String(256), nullable=False)


def _units(passed: str = "allowed") -> tuple[Column[int], Column[int], Column[int]]:
    first, second, third = (Column(name, BigInteger, nullable=False) for name in (passed, "blocked", "over_limit"))
    return first, second, third


def _violations(name: str, index: str) -> Table:
    """One row for each minute in which a rule blocked a subject, or would have. PostgreSQL has one partition per day, so that old
    days are dropped and not deleted; rows without a partition of their day are in the default one.
    """
    return Table(
        name,
        metadata,
        Column("minute_us", BigInteger, nullable=False),
        *_rule(),
        Column("subject", String(160), nullable=False),
        Column("blocked", BigInteger, nullable=False),
        PrimaryKeyConstraint("minute_us", "tier", "rule", "subject"),
        Index(index, "subject", "minute_us"),
        postgresql_partition_by="RANGE (minute_us)",
    )


rate_limit_violations: Final = _violations("rate_limit_violations", "idx_violations_subject_minute")
# Of shadow rules.
shadow_violations: Final = _violations("shadow_violations", "idx_shadow_violations_subject_minute")

# Units by day (UTC), customer and key: what invoices are made of. PostgreSQL has one partition per month.
usage_ledger: Final = Table(
    "usage_ledger",
    metadata,
    Column("day_us", BigInteger, nullable=False),
    Column("customer", String(200), nullable=False),
    Column("key_id", String(24), nullable=False),
    *_rule(),
    *_units("admitted"),
    PrimaryKeyConstraint("day_us", "customer", "key_id", "tier", "rule"),
    Index("idx_ledger_key_day", "key_id", "day_us"),
    Index("idx_ledger_customer_day", "customer", "day_us"),
    postgresql_partition_by="RANGE (day_us)",
)

# The last batch of each process that was added to the ledger and the traffic history: a repeated one is not added again.
ledger_batches: Final = Table(
    "ledger_batches",
    metadata,
    Column("instance", String(32), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("written_at_us", BigInteger, nullable=False),
    PrimaryKeyConstraint("instance"),
)

# Units by rule: of each minute in the last days (PostgreSQL: one partition per day), of each hour before.
traffic_minutes: Final = Table(
    "traffic_minutes",
    metadata,
    Column("minute_us", BigInteger, nullable=False),
    *_rule(),
    *_units(),
    PrimaryKeyConstraint("minute_us", "tier", "rule"),
    postgresql_partition_by="RANGE (minute_us)",
)
traffic_hours: Final = Table(
    "traffic_hours",
    metadata,
    Column("hour_us", BigInteger, nullable=False),
    *_rule(),
    *_units(),
    PrimaryKeyConstraint("hour_us", "tier", "rule"),
)

# Units of the callers with the most units, by hour. PostgreSQL has one partition per day.
traffic_callers: Final = Table(
    "traffic_callers",
    metadata,
    Column("hour_us", BigInteger, nullable=False),
    *_rule(),
    Column("subject", String(160), nullable=False),
    *_units(),
    PrimaryKeyConstraint("hour_us", "tier", "rule", "subject"),
    Index("idx_traffic_subject_hour", "subject", "hour_us"),
    postgresql_partition_by="RANGE (hour_us)",
)

# Checks by minute or hour (step_s) and bucket of `tidegate.latency`.
traffic_latency: Final = Table(
    "traffic_latency",
    metadata,
    Column("step_s", Integer, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Column("bucket", Integer, nullable=False),
    Column("checks", BigInteger, nullable=False),
    PrimaryKeyConstraint("step_s", "at_us", "bucket"),
)

admin_tokens: Final = Table(
    "admin_tokens",
    metadata,
    Column("id", _RowId, primary_key=True, autoincrement=True),
    Column("name", String(200), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("expires_at_us", BigInteger, nullable=True),
    Column("revoked_at_us", BigInteger, nullable=True),
    UniqueConstraint("sha256"),
)

# Tokens of gateways and back ends, for the data plane.
caller_tokens: Final = Table(
    "caller_tokens",
    metadata,
    Column("id", _RowId, primary_key=True, autoincrement=True),
    Column("name", String(200), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("expires_at_us", BigInteger, nullable=True),
    Column("revoked_at_us", BigInteger, nullable=True),
    UniqueConstraint("sha256"),
)

# Sessions of the console: the digest of the cookie's value, and that of the token that signed in.
console_sessions: Final = Table(
    "console_sessions",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("token_sha256", String(64), nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("used_at_us", BigInteger, nullable=False),
)

# Runs of what-if: any instance answers for them, one works on them.
what_if_runs: Final = Table(
    "what_if_runs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("actor", String(200), nullable=False),
    Column("state", String(16), nullable=False),
    Column("progress", Float, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("changed_at_us", BigInteger, nullable=False),
    Column("result", JSON(none_as_null=True), nullable=True),
)

# Events to be sent to the URLs of [[notify]], and those that were sent. Rows of one event and URL have the same id, whichever
# process writes them. A process claims a row by moving `next_at_us` to the end of its claim.
notifications: Final = Table(
    "notifications",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("event", String(16), nullable=False),
    Column("subject", String(400), nullable=False),
    Column("url", String(1000), nullable=False),
    Column("body", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("next_at_us", BigInteger, nullable=False),
    Column("give_up_at_us", BigInteger, nullable=False),
    # When the last attempt ended, what the receiver answered, and why it was not accepted.
    Column("attempted_at_us", BigInteger, nullable=True),
    Column("answer", Integer, nullable=True),
    Column("error", String(300), nullable=True),
    Index("idx_notifications_created", "created_at_us", "id"),
    Index("idx_notifications_status", "status", "created_at_us", "id"),
    Index(
        "idx_notifications_due",
        "next_at_us",
        sqlite_where=text("status = 'pending'"),
        postgresql_where=text("status = 'pending'"),
    ),
)

# Whom operators stopped. A block that was removed or has ended keeps its row for a while, so that every process reads that.
blocks: Final = Table(
    "blocks",
    metadata,
    Column("id", _RowId, primary_key=True, autoincrement=True),
    Column("kind", String(16), nullable=False),
    Column("target", String(400), nullable=False),
    Column("reason", String(1000), nullable=False),
    Column("message", String(200), nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("until_us", BigInteger, nullable=True),
    Column("ended_at_us", BigInteger, nullable=True),
    # Of the catalog at the last change of the row.
    Column("version", BigInteger, nullable=False),
    Index(
        "idx_blocks_holding",
        "kind",
        "target",
        unique=True,
        sqlite_where=text("ended_at_us IS NULL"),
        postgresql_where=text("ended_at_us IS NULL"),
    ),
    Index("idx_blocks_version", "version", "id"),
)

audit_log: Final = Table(
    "audit_log",
    metadata,
    Column("id", _RowId, primary_key=True, autoincrement=True),
    Column("at_us", BigInteger, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(32), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("target", String(400), nullable=False),
    Column("before", JSON, nullable=True),
    Column("after", JSON, nullable=True),
    Index("idx_audit_log_kind_target", "kind", "target", "id"),
    Index("idx_audit_log_target", "target", "id"),
    Index("idx_audit_log_actor", "actor", "id"),
)
