"""Violations, operators' tokens, the audit log, and a revision for each row that is edited.

Only adds: instances of the previous version keep working beside those of this one.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_row_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_edited = ("tiers", "rate_limit_rules", "api_keys")


def upgrade() -> None:
    for table in _edited:
        op.add_column(table, sa.Column("revision", sa.BigInteger, nullable=False, server_default="1"))
    op.create_table(
        "rate_limit_violations",
        sa.Column("minute_us", sa.BigInteger, nullable=False),
        sa.Column("tier", sa.String(64), nullable=False),
        sa.Column("rule", sa.String(256), nullable=False),
        sa.Column("subject", sa.String(160), nullable=False),
        sa.Column("blocked", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("minute_us", "tier", "rule", "subject", name="pk_rate_limit_violations"),
        postgresql_partition_by="RANGE (minute_us)",
    )
    op.create_index("idx_violations_subject_minute", "rate_limit_violations", ["subject", "minute_us"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE TABLE rate_limit_violations_default PARTITION OF rate_limit_violations DEFAULT")
    op.create_table(
        "admin_tokens",
        sa.Column("id", _row_id, nullable=False, autoincrement=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("expires_at_us", sa.BigInteger, nullable=True),
        sa.Column("revoked_at_us", sa.BigInteger, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_admin_tokens"),
        sa.UniqueConstraint("sha256", name="uq_admin_tokens_sha256"),
    )
    op.create_table(
        "audit_log",
        sa.Column("id", _row_id, nullable=False, autoincrement=True),
        sa.Column("at_us", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("target", sa.String(400), nullable=False),
        sa.Column("before", sa.JSON, nullable=True),
        sa.Column("after", sa.JSON, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit_log"),
    )
    op.create_index("idx_audit_log_kind_target", "audit_log", ["kind", "target", "id"])


def downgrade() -> None:
    for table in ("audit_log", "admin_tokens", "rate_limit_violations"):
        op.drop_table(table)
    for table in _edited:
        op.drop_column(table, "revision")
