"""Tiers, rules, API keys, and the state of the policy.

Does not use `tables.py`: the result of this migration stays the same when the tables change later.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_row_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "tiers",
        sa.Column("id", _row_id, nullable=False, autoincrement=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("managed_by_file", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tiers"),
        sa.UniqueConstraint("name", name="uq_tiers_name"),
    )
    op.create_table(
        "rate_limit_rules",
        sa.Column("id", _row_id, nullable=False, autoincrement=True),
        sa.Column("tier_id", _row_id, nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("endpoint_pattern", sa.String(1024), nullable=False),
        sa.Column("methods", sa.JSON, nullable=False),
        sa.Column("algorithm", sa.String(32), nullable=False),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("subject", sa.String(16), nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("on_failure", sa.String(16), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("managed_by_file", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_rate_limit_rules"),
        sa.ForeignKeyConstraint(["tier_id"], ["tiers.id"], name="fk_rate_limit_rules_tier_id", ondelete="CASCADE"),
        sa.UniqueConstraint("tier_id", "name", name="uq_rate_limit_rules_tier_id_name"),
    )
    op.create_index("idx_rules_tier_endpoint", "rate_limit_rules", ["tier_id", "endpoint_pattern"])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(24), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("tier_id", _row_id, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("expires_at_us", sa.BigInteger, nullable=True),
        sa.Column("overrides", sa.JSON, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("revoked_at_us", sa.BigInteger, nullable=True),
        sa.Column("revoked_reason", sa.String(1000), nullable=True),
        sa.Column("managed_by_file", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.ForeignKeyConstraint(["tier_id"], ["tiers.id"], name="fk_api_keys_tier_id"),
        sa.UniqueConstraint("sha256", name="uq_api_keys_sha256"),
    )
    op.create_index("idx_api_keys_tier_id", "api_keys", ["tier_id", "id"])
    op.create_index(
        "idx_api_keys_status",
        "api_keys",
        ["status"],
        sqlite_where=sa.text("status = 'active'"),
        postgresql_where=sa.text("status = 'active'"),
    )
    state = op.create_table(
        "policy_state",
        sa.Column("id", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("anonymous_tier", sa.String(64), nullable=True),
        sa.Column("file_digest", sa.String(64), nullable=True),
        sa.Column("changed_at_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_policy_state"),
        sa.CheckConstraint("id = 1", name=op.f("ck_policy_state_single_row")),
    )
    op.bulk_insert(state, [{"id": 1, "version": 0, "anonymous_tier": None, "file_digest": None, "changed_at_us": 0}])


def downgrade() -> None:
    for table in ("policy_state", "api_keys", "rate_limit_rules", "tiers"):
        op.drop_table(table)
