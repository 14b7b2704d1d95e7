"""Rules by attributes of the caller, and who a caller without an API key is.

Adds only: instances of the version before neither read nor write the columns. To them a rule that counts by attributes counts API
keys, and one with a match holds for all callers of its endpoint: upgrade all instances before the first such rule is made.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rate_limit_rules", sa.Column("match_attributes", sa.JSON, nullable=True))
    op.add_column("rate_limit_rules", sa.Column("subject_attributes", sa.JSON, nullable=True))
    op.add_column("rate_limit_rules", sa.Column("on_missing", sa.String(16), nullable=True))
    op.add_column("policy_state", sa.Column("attributes", sa.JSON, nullable=True))
    op.add_column("policy_state", sa.Column("callers", sa.JSON, nullable=True))


def downgrade() -> None:
    for column in ("callers", "attributes"):
        op.drop_column("policy_state", column)
    for column in ("on_missing", "subject_attributes", "match_attributes"):
        op.drop_column("rate_limit_rules", column)
