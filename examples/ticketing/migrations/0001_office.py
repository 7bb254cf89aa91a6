"""The office's tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create them all."""
    op.create_table(
        "ticketing_items",
        sa.Column("item", sa.Text, primary_key=True),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("stock", sa.Integer, nullable=False),
        sa.Column("free", sa.Integer, nullable=False),
        sa.CheckConstraint("free >= 0 AND free <= stock", name="ticketing_items_free"),
    )
    op.create_table(
        "ticketing_tickets",
        sa.Column("item", sa.Text, sa.ForeignKey("ticketing_items.item"), primary_key=True),
        sa.Column("serial", sa.Integer, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("order_id", sa.Text),
        sa.Column("line", sa.Integer),
        sa.Column("price_cents", sa.BigInteger),
        sa.CheckConstraint("state IN ('free', 'held', 'issued')", name="ticketing_tickets_state"),
        sa.CheckConstraint("(state = 'free') = (order_id IS NULL)", name="ticketing_tickets_owner"),
    )
    op.create_index("ticketing_tickets_free", "ticketing_tickets", ["item", "state", "serial"])
    op.create_index("ticketing_tickets_order", "ticketing_tickets", ["order_id"])
    op.create_table(
        "ticketing_purchases",
        sa.Column("order_id", sa.Text, primary_key=True),
        sa.Column("line", sa.Integer, nullable=False),
        sa.Column("customer_id", sa.Text, nullable=False),
        sa.Column("total_cents", sa.BigInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("tickets_held", sa.Integer, nullable=False, server_default="0"),
        sa.CheckConstraint(
            "state IN ('accepted', 'held', 'charged', 'issued', 'completed', 'cancelled')",
            name="ticketing_purchases_state",
        ),
    )
    op.create_table(
        "ticketing_payments",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("order_id", sa.Text, nullable=False),
        sa.Column("amount_cents", sa.BigInteger, nullable=False),
        sa.CheckConstraint("kind IN ('charge', 'refund') AND amount_cents > 0", name="ticketing_payments_sane"),
    )
    op.create_table(
        "ticketing_sales",
        sa.Column("item", sa.Text, primary_key=True),
        sa.Column("held", sa.Integer, nullable=False, server_default="0"),
        sa.Column("sold", sa.Integer, nullable=False, server_default="0"),
        sa.Column("revenue_cents", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_table(
        "ticketing_customers",
        sa.Column("customer_id", sa.Text, primary_key=True),
        sa.Column("completed", sa.Integer, nullable=False, server_default="0"),
        sa.Column("cancelled", sa.Integer, nullable=False, server_default="0"),
        sa.Column("paid_cents", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("refunded_cents", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_table(
        "ticketing_receipts",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("order_id", sa.Text, nullable=False),
        sa.Column("amount_cents", sa.BigInteger, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_table(
        "ticketing_handled",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("consumer", sa.Text, nullable=False),
        sa.Column("event_type", sa.Text, nullable=False),
        sa.Column("order_id", sa.Text, nullable=False),
    )
