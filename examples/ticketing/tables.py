"""The office's own tables, beside those of the packages in the same database. Money is in cents, in whole numbers."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import BigInteger, CheckConstraint, Column, ForeignKey, Index, Integer, MetaData, Table, Text

from mainstay.database import Schema

metadata = MetaData()

# How many of an item are left; the row is also what two purchases of the same item queue for.
items = Table(
    "ticketing_items",
    metadata,
    Column("item", Text, primary_key=True),
    Column("title", Text, nullable=False),
    Column("stock", Integer, nullable=False),
    Column("free", Integer, nullable=False),
    CheckConstraint("free >= 0 AND free <= stock", name="ticketing_items_free"),
)

# One row for each ticket there is, so that a ticket has one owner or none, and never two.
tickets = Table(
    "ticketing_tickets",
    metadata,
    Column("item", Text, ForeignKey("ticketing_items.item"), primary_key=True),
    Column("serial", Integer, primary_key=True),
    Column("state", Text, nullable=False),
    Column("order_id", Text),
    Column("line", Integer),
    Column("price_cents", BigInteger),
    CheckConstraint("state IN ('free', 'held', 'issued')", name="ticketing_tickets_state"),
    CheckConstraint("(state = 'free') = (order_id IS NULL)", name="ticketing_tickets_owner"),
    Index("ticketing_tickets_free", "item", "state", "serial"),
    Index("ticketing_tickets_order", "order_id"),
)

purchases = Table(
    "ticketing_purchases",
    metadata,
    Column("order_id", Text, primary_key=True),
    Column("line", Integer, nullable=False),
    Column("customer_id", Text, nullable=False),
    Column("total_cents", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("tickets_held", Integer, nullable=False, server_default="0"),
    CheckConstraint(
        "state IN ('accepted', 'held', 'charged', 'issued', 'completed', 'cancelled')", name="ticketing_purchases_state"
    ),
)

# The office's own ledger: every movement of money that the provider has confirmed.
payments = Table(
    "ticketing_payments",
    metadata,
    Column("key", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("order_id", Text, nullable=False),
    Column("amount_cents", BigInteger, nullable=False),
    CheckConstraint("kind IN ('charge', 'refund') AND amount_cents > 0", name="ticketing_payments_sane"),
)

# What the events feed. Nothing here hides an event that came twice: a counter counts it twice, a list lists it twice.
sales = Table(
    "ticketing_sales",
    metadata,
    Column("item", Text, primary_key=True),
    Column("held", Integer, nullable=False, server_default="0"),
    Column("sold", Integer, nullable=False, server_default="0"),
    Column("revenue_cents", BigInteger, nullable=False, server_default="0"),
)
customers = Table(
    "ticketing_customers",
    metadata,
    Column("customer_id", Text, primary_key=True),
    Column("completed", Integer, nullable=False, server_default="0"),
    Column("cancelled", Integer, nullable=False, server_default="0"),
    Column("paid_cents", BigInteger, nullable=False, server_default="0"),
    Column("refunded_cents", BigInteger, nullable=False, server_default="0"),
)
receipts = Table(
    "ticketing_receipts",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("order_id", Text, nullable=False),
    Column("amount_cents", BigInteger, nullable=False),
    Column("text", Text, nullable=False),
)
handled = Table(
    "ticketing_handled",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("consumer", Text, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("order_id", Text, nullable=False),
)

SCHEMA = Schema("ticketing", metadata, Path(__file__).with_name("migrations"))
