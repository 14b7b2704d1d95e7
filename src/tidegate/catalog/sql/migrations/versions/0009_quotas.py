"""Quotas and overage of tiers and rules; rules that only report what is above their limits.

Adds only: instances of the version before neither read nor write the columns, so they enforce no quota, and they do not load a
tier with a soft rule or with a rule without limits: upgrade all instances before the first such rule is made.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("tiers", "rate_limit_rules"):
        op.add_column(table, sa.Column("quotas", sa.JSON, nullable=True))
        op.add_column(table, sa.Column("overage", sa.JSON, nullable=True))


def downgrade() -> None:
    for table in ("rate_limit_rules", "tiers"):
        op.drop_column(table, "overage")
        op.drop_column(table, "quotas")
