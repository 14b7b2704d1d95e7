"""What shadow rules would have blocked.

Adds only: instances of the version before neither read nor write the table.
"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "shadow_violations",
        sa.Column("minute_us", sa.BigInteger, nullable=False),
        sa.Column("tier", sa.String(64), nullable=False),
        sa.Column("rule", sa.String(256), nullable=False),
        sa.Column("subject", sa.String(160), nullable=False),
        sa.Column("blocked", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("minute_us", "tier", "rule", "subject", name="pk_shadow_violations"),
        postgresql_partition_by="RANGE (minute_us)",
    )
    op.create_index("idx_shadow_violations_subject_minute", "shadow_violations", ["subject", "minute_us"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE TABLE shadow_violations_default PARTITION OF shadow_violations DEFAULT")


def downgrade() -> None:
    op.drop_table("shadow_violations")
