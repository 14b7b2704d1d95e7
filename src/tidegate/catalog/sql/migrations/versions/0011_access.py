"""Who is allowed or denied before anything is counted: blocks, [[access]] of a policy, actions of rules.

Adds only: instances of the version before neither read nor write table and column, so they block nobody, and
refuse a tier with a rule that has an action: upgrade all instances before the first such rule is made.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    row_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "blocks",
        sa.Column("id", row_id, autoincrement=True, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("target", sa.String(400), nullable=False),
        sa.Column("reason", sa.String(1000), nullable=False),
        sa.Column("message", sa.String(200), nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("until_us", sa.BigInteger, nullable=True),
        sa.Column("ended_at_us", sa.BigInteger, nullable=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_blocks"),
    )
    holding = sa.text("ended_at_us IS NULL")
    op.create_index(
        "idx_blocks_holding", "blocks", ["kind", "target"], unique=True, sqlite_where=holding, postgresql_where=holding
    )
    op.create_index("idx_blocks_version", "blocks", ["version", "id"])
    op.add_column("rate_limit_rules", sa.Column("action", sa.String(16), nullable=True))
    op.add_column("policy_state", sa.Column("access", sa.JSON, nullable=True))


def downgrade() -> None:
    op.drop_column("policy_state", "access")
    op.drop_column("rate_limit_rules", "action")
    op.drop_table("blocks")
