"""${message}"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    """Make the tables what this revision says."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Make the tables what they were before."""
    ${downgrades if downgrades else "pass"}
