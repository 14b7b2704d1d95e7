"""Other limits for some subjects of a tier's rules.

Adds only: instances of the version before neither read nor write the table, and give all subjects the limits of the rule.
"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    row_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "subject_overrides",
        sa.Column("tier_id", row_id, autoincrement=False, nullable=False),
        sa.Column("entries", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("tier_id", name="pk_subject_overrides"),
        sa.ForeignKeyConstraint(["tier_id"], ["tiers.id"], name="fk_subject_overrides_tier_id", ondelete="CASCADE"),
    )


def downgrade() -> None:
    op.drop_table("subject_overrides")
