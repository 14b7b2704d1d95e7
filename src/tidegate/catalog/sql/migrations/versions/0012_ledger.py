"""The usage ledger, and the traffic history.

Adds only: instances of the version before write neither.
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _table("usage_ledger", "day_us", {"customer": 200, "key_id": 24, "tier": 64, "rule": 256}, "admitted")
    op.create_index("idx_ledger_key_day", "usage_ledger", ["key_id", "day_us"])
    op.create_index("idx_ledger_customer_day", "usage_ledger", ["customer", "day_us"])
    op.create_table(
        "ledger_batches",
        sa.Column("instance", sa.String(32), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("written_at_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("instance", name="pk_ledger_batches"),
    )
    _table("traffic_minutes", "minute_us", {"tier": 64, "rule": 256}, "allowed")
    _table("traffic_hours", "hour_us", {"tier": 64, "rule": 256}, "allowed")
    _table("traffic_callers", "hour_us", {"tier": 64, "rule": 256, "subject": 160}, "allowed")
    op.create_index("idx_traffic_subject_hour", "traffic_callers", ["subject", "hour_us"])
    op.create_table(
        "traffic_latency",
        sa.Column("step_s", sa.Integer, nullable=False),
        sa.Column("at_us", sa.BigInteger, nullable=False),
        sa.Column("bucket", sa.Integer, nullable=False),
        sa.Column("checks", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("step_s", "at_us", "bucket", name="pk_traffic_latency"),
    )


def _table(name: str, at: str, texts: dict[str, int], passed: str) -> None:
    """A table of units by time and texts."""
    partitioned = name in ("usage_ledger", "traffic_minutes", "traffic_callers")
    op.create_table(
        name,
        sa.Column(at, sa.BigInteger, nullable=False),
        *(sa.Column(column, sa.String(length), nullable=False) for column, length in texts.items()),
        *(sa.Column(column, sa.BigInteger, nullable=False) for column in (passed, "blocked", "over_limit")),
        sa.PrimaryKeyConstraint(at, *texts, name=f"pk_{name}"),
        postgresql_partition_by=f"RANGE ({at})" if partitioned else None,
    )
    if partitioned and op.get_bind().dialect.name == "postgresql":
        op.execute(f"CREATE TABLE {name}_default PARTITION OF {name} DEFAULT")


def downgrade() -> None:
    for table in ("traffic_latency", "traffic_callers", "traffic_hours", "traffic_minutes", "ledger_batches", "usage_ledger"):
        op.drop_table(table)
