"""Notifications by webhook.

Adds only: instances of the version before neither read nor write it, so they report no crossed threshold.
"""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("policy_state", sa.Column("notify", sa.JSON, nullable=True))
    op.create_table(
        "notifications",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("event", sa.String(16), nullable=False),
        sa.Column("subject", sa.String(400), nullable=False),
        sa.Column("url", sa.String(1000), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("next_at_us", sa.BigInteger, nullable=False),
        sa.Column("give_up_at_us", sa.BigInteger, nullable=False),
        sa.Column("attempted_at_us", sa.BigInteger, nullable=True),
        sa.Column("answer", sa.Integer, nullable=True),
        sa.Column("error", sa.String(300), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_notifications"),
    )
    op.create_index("idx_notifications_created", "notifications", ["created_at_us", "id"])
    op.create_index("idx_notifications_status", "notifications", ["status", "created_at_us", "id"])
    pending = sa.text("status = 'pending'")
    op.create_index("idx_notifications_due", "notifications", ["next_at_us"], sqlite_where=pending, postgresql_where=pending)


def downgrade() -> None:
    op.drop_table("notifications")
    op.drop_column("policy_state", "notify")
