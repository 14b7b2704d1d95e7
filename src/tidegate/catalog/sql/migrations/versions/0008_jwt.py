"""Bearer tokens of other issuers, and namespaces for limits in the request.

Adds only: instances of the version before neither read nor write the columns, so they accept no such token.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("policy_state", sa.Column("jwt", sa.JSON, nullable=True))
    op.add_column("policy_state", sa.Column("namespaces", sa.JSON, nullable=True))


def downgrade() -> None:
    for column in ("namespaces", "jwt"):
        op.drop_column("policy_state", column)
