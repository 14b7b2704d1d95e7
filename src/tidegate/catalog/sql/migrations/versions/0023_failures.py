"""Rules that count failures.

Adds only: instances of the version before neither read nor write the column, and count the requests of such a rule: upgrade all
instances before the first one is made.
"""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rate_limit_rules", sa.Column("failures", sa.JSON, nullable=True))


def downgrade() -> None:
    op.drop_column("rate_limit_rules", "failures")
