"""The secret that seals entries of the shared cache, and the key whose counters a rotated API key keeps.

Only adds: instances of the previous version neither read nor write the columns; they count a rotated key separately.
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
