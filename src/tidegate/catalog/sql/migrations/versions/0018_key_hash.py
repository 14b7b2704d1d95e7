"""How the API keys of the catalog were hashed, if not with plain SHA-256.

Adds only: instances of the version before neither read nor write the column, and hash with SHA-256.
"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("policy_state", sa.Column("key_hash", sa.String(40), nullable=True))


def downgrade() -> None:
    op.drop_column("policy_state", "key_hash")
