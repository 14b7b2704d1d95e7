"""The secret that entries of the shared cache are sealed with, and whose counters a rotated API key goes on with.

Adds only: instances of the version before neither read nor write the columns. To them a rotated key counts for itself.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("policy_state", sa.Column("cache_secret", sa.String(64), nullable=True))
    op.add_column("api_keys", sa.Column("counts_as", sa.String(24), nullable=True))


def downgrade() -> None:
    op.drop_column("api_keys", "counts_as")
    op.drop_column("policy_state", "cache_secret")
