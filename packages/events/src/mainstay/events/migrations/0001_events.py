"""The log with its offsets and members, the outbox, what waits for its time, the inbox, dead letters."""

import sqlalchemy as sa
from alembic import op

revision = "0001_events"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    postgresql = op.get_context().dialect.name == "postgresql"
    big = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    xid = "(pg_current_xact_id()::text::bigint)" if postgresql else "0"
    now = "(extract(epoch FROM now())::bigint)" if postgresql else "(CAST(strftime('%s', 'now') AS INTEGER))"
    op.create_table(
        "mainstay_events_log",
        sa.Column("xid", sa.BigInteger, nullable=False, server_default=sa.text(xid)),
        sa.Column("position", big, primary_key=True, autoincrement=True),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("key", sa.LargeBinary),
        sa.Column("value", sa.LargeBinary),
        sa.Column("headers", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False, server_default=sa.text(now)),
        sqlite_autoincrement=True,
    )
    if postgresql:  # on SQLite the position itself is the order of commits
        op.create_index("mainstay_events_log_xid", "mainstay_events_log", ["xid", "position"])
    op.create_table(
        "mainstay_events_offsets",
        sa.Column("group_name", sa.Text, primary_key=True),
        sa.Column("topic", sa.Text, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True),
        sa.Column("low", sa.Text, nullable=False),
        sa.Column("high", sa.Text, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "mainstay_events_members",
        sa.Column("group_name", sa.Text, primary_key=True),
        sa.Column("member", sa.Text, primary_key=True),
        sa.Column("topic", sa.Text, primary_key=True),
        sa.Column("expires_at", sa.Double, nullable=False),
    )
    op.create_table(
        "mainstay_events_outbox",
        sa.Column("position", big, primary_key=True, autoincrement=True),
        sa.Column("lane", sa.Integer, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("aside", sa.Integer, nullable=False, server_default="-1"),
        sa.Column("key", sa.LargeBinary),
        sa.Column("value", sa.LargeBinary),
        sa.Column("headers", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False, server_default=sa.text(now)),
        sqlite_autoincrement=True,
    )
    # For each topic the rows that are to be sent, and for each partition those that were put aside, in order.
    op.create_index("mainstay_events_outbox_topic", "mainstay_events_outbox", ["topic", "aside", "position"])
    op.create_table(
        "mainstay_events_refused",
        sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("key", sa.LargeBinary),
        sa.Column("value", sa.LargeBinary),
        sa.Column("headers", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "mainstay_events_scheduled",
        sa.Column("position", big, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("due_at", sa.Double, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("key", sa.LargeBinary),
        sa.Column("value", sa.LargeBinary),
        sa.Column("headers", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False, server_default=sa.text(now)),
        sqlite_autoincrement=True,
    )
    op.create_index("mainstay_events_scheduled_id", "mainstay_events_scheduled", ["id"])
    op.create_index("mainstay_events_scheduled_due", "mainstay_events_scheduled", ["due_at", "position"])
    op.create_table(
        "mainstay_events_inbox",
        sa.Column("group_name", sa.Text, primary_key=True),
        sa.Column("event_id", sa.Text, primary_key=True),
        sa.Column("created_at", sa.BigInteger, nullable=False, server_default=sa.text(now)),
    )
    op.create_index("mainstay_events_inbox_created_at", "mainstay_events_inbox", ["created_at"])
    op.create_table(
        "mainstay_events_dead_letters",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("group_name", sa.Text, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("key", sa.LargeBinary),
        sa.Column("value", sa.LargeBinary),
        sa.Column("headers", sa.Text, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("correlation_id", sa.Text),
        sa.Column("state", sa.Text, nullable=False, server_default="waiting"),
        sa.Column("received", sa.LargeBinary),
        sa.Column("edited", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("reason", sa.Text, nullable=False, server_default=""),
        sa.Column("changed_by", sa.Text, nullable=False, server_default=""),
        sa.Column("changed_at", sa.DateTime(timezone=True)),
    )
    op.create_index("mainstay_events_dead_letters_state", "mainstay_events_dead_letters", ["state", "time", "id"])
    op.create_table(
        "mainstay_events_parked_keys",
        sa.Column("group_name", sa.Text, primary_key=True),
        sa.Column("topic", sa.Text, primary_key=True),
        sa.Column("key", sa.LargeBinary, primary_key=True),
        sa.Column("id", sa.Uuid, nullable=False, unique=True),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("postponed", sa.Integer, nullable=False),
        sa.Column("later", sa.Integer, nullable=False),
        sa.Column("waited_seconds", sa.Double, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("failing_since", sa.Double, nullable=False),
        sa.Column("due_at", sa.Double),
        sa.Column("begun", sa.Integer, nullable=False, server_default="0"),
        sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("claimed_until", sa.Double),
        sa.Column("alone", sa.Boolean, nullable=False),
        sa.Column("own_key", sa.LargeBinary),
    )
    op.create_index("mainstay_events_parked_keys_due", "mainstay_events_parked_keys", ["group_name", "due_at"])
    op.create_table(
        "mainstay_events_handled",
        sa.Column("group_name", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("seen_at", sa.Double, nullable=False),
    )
    op.create_table(
        "mainstay_events_parked",
        sa.Column("position", big, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Uuid, nullable=False, unique=True),
        sa.Column("group_name", sa.Text, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("value", sa.LargeBinary),
        sa.Column("headers", sa.Text, nullable=False),
        sa.Column("handled", sa.Boolean, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "mainstay_events_parked_queue", "mainstay_events_parked", ["group_name", "topic", "key", "position"]
    )
    op.create_table(
        "mainstay_events_pauses",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("group_name", sa.Text, nullable=False),
        sa.Column("kind", sa.Text),
        sa.Column("key", sa.LargeBinary),
        sa.Column("paused_by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("paused_at", sa.Double, nullable=False),
    )
    op.create_table(
        "mainstay_events_holders",
        sa.Column("group_name", sa.Text, primary_key=True),
        sa.Column("topic", sa.Text, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True),
        sa.Column("holder", sa.Uuid, nullable=False),
        sa.Column("held", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("first", sa.BigInteger),
        sa.Column("ends", sa.Integer, nullable=False, server_default="0"),
        sa.Column("called", sa.BigInteger),
        sa.Column("calling", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("called_seconds", sa.Double, nullable=False, server_default="0"),
        sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
    )
    op.create_table(
        "mainstay_events_in_hand",
        sa.Column("group_name", sa.Text, primary_key=True),
        sa.Column("process", sa.Text, primary_key=True),
        sa.Column("topic", sa.Text, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True),
        sa.Column("offset", sa.BigInteger, primary_key=True),
        sa.Column("key", sa.LargeBinary),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("event_id", sa.Text, nullable=False),
        sa.Column("handler", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("began_at", sa.Double, nullable=False),
        sa.Column("again_at", sa.Double),
        sa.Column("noted_at", sa.Double, nullable=False),
    )
