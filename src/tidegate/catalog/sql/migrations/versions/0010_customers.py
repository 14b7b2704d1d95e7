"""Customers, who own API keys and attribute values.

Adds only: instances of the version before neither read nor write it. To them a key keeps the tier that its customer had when the
key or the customer was changed last, and a rule that counts customers counts by address: upgrade all instances before the first
customer is made.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    row_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "customers",
        sa.Column("id", row_id, autoincrement=True, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("external_id", sa.String(200), nullable=True),
        sa.Column("tier_id", row_id, sa.ForeignKey("tiers.id", name="fk_customers_tier_id"), nullable=True),
        sa.Column("anchor", sa.String(10), nullable=False),
        sa.Column("timezone", sa.String(64), nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("match_attributes", sa.JSON, nullable=True),
        sa.Column("overrides", sa.JSON, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("managed_by_file", sa.Boolean, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False, server_default="1"),
        sa.PrimaryKeyConstraint("id", name="pk_customers"),
        sa.UniqueConstraint("name", name="uq_customers_name"),
        sa.UniqueConstraint("external_id", name="uq_customers_external_id"),
    )
    op.create_index("idx_customers_tier_id", "customers", ["tier_id"])
    op.create_table(
        "customer_values",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("customer_id", row_id, nullable=False),
        sa.Column("attribute", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_customer_values"),
    )
    op.create_index("idx_customer_values_customer_id", "customer_values", ["customer_id"])
    op.create_index("idx_customer_values_attribute", "customer_values", ["attribute"])
    op.add_column("api_keys", sa.Column("customer_id", row_id, nullable=True))
    op.add_column("api_keys", sa.Column("inherits_tier", sa.Boolean, nullable=False, server_default=sa.false()))
    where = sa.text("customer_id IS NOT NULL")
    op.create_index("idx_api_keys_customer_id", "api_keys", ["customer_id", "id"], sqlite_where=where, postgresql_where=where)
    op.add_column("policy_state", sa.Column("customer_attributes", sa.JSON, nullable=True))


def downgrade() -> None:
    op.drop_column("policy_state", "customer_attributes")
    op.drop_index("idx_api_keys_customer_id", "api_keys")
    for column in ("inherits_tier", "customer_id"):
        op.drop_column("api_keys", column)
    op.drop_table("customer_values")
    op.drop_table("customers")
