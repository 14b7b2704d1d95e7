"""Indexes for the pages of the admin API that no index answered, and for the API keys of the policy file.

Only adds. PostgreSQL blocks writes to the table while it builds an index: a few seconds for a million API keys; checks continue.
CREATE INDEX CONCURRENTLY would not block writers, but cannot run in a transaction, as all migrations do: one that failed half-way
would leave a database between two revisions. With many more keys, create the indexes beforehand, by hand and CONCURRENTLY,
under the same names: existing ones are not created again.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name, table, columns, sqlite_where, postgresql_where in _indexes:
        op.create_index(name, table, columns, sqlite_where=sqlite_where, postgresql_where=postgresql_where, if_not_exists=True)


def downgrade() -> None:
    for name, table, *_ in reversed(_indexes):
        op.drop_index(name, table)


_revoked = sa.text("status = 'revoked'")
_expires = sa.text("expires_at_us IS NOT NULL")
_indexes = (
    ("idx_rules_tier_id", "rate_limit_rules", ["tier_id", "id"], None, None),
    ("idx_api_keys_revoked", "api_keys", ["id"], _revoked, _revoked),
    ("idx_api_keys_expires", "api_keys", ["expires_at_us"], _expires, _expires),
    ("idx_api_keys_file", "api_keys", ["id"], sa.text("managed_by_file = 1"), sa.text("managed_by_file")),
    ("idx_audit_log_target", "audit_log", ["target", "id"], None, None),
    ("idx_audit_log_actor", "audit_log", ["actor", "id"], None, None),
)
