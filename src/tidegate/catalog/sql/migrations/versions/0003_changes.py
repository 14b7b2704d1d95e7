"""The log of changes of the catalog, and which versions of Tidegate work with the schema.

Only adds: changes by instances of the previous version write no rows, which readers treat as a change of everything.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("policy_state", sa.Column("previous", sa.BigInteger, nullable=True))
    op.add_column("policy_state", sa.Column("runs_from", sa.String(16), nullable=False, server_default="0001"))
    op.create_table(
        "catalog_changes",
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("previous", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("version", "kind", "name", name="pk_catalog_changes"),
    )


def downgrade() -> None:
    op.drop_table("catalog_changes")
    op.drop_column("policy_state", "runs_from")
    op.drop_column("policy_state", "previous")
