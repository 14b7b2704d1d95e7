"""Rules whose limits are not leased.

Adds only: instances of the version before neither read nor write the column, and lease nothing.
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rate_limit_rules", sa.Column("leases", sa.Boolean, nullable=True))


def downgrade() -> None:
    op.drop_column("rate_limit_rules", "leases")
