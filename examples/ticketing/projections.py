"""What the events feed: sales per item, purchases per customer, and the receipts.

Each handler counts upwards, without looking whether it has seen the event: that it runs exactly once is the inbox's
work, and if it did not, the sums would show it. `handled` lists every effect, for the recount at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import bindparam, insert, update
from sqlalchemy.sql.dml import ReturningUpdate

from mainstay.core import given
from mainstay.database import Database
from mainstay.events import EventRouter
from ticketing.messages import (
    PaymentCaptured,
    PaymentRefunded,
    PurchaseCancelled,
    PurchaseCompleted,
    Tickets,
    TicketsHeld,
)
from ticketing.tables import customers, handled, receipts, sales

events = EventRouter()

_HANDLED = insert(handled)
_RECEIPT = insert(receipts)
_SALES = (
    update(sales)
    .where(sales.c.item == bindparam("of_item"))
    .values(
        held=sales.c.held + bindparam("more_held"),
        sold=sales.c.sold + bindparam("more_sold"),
        revenue_cents=sales.c.revenue_cents + bindparam("more_revenue"),
    )
    .returning(sales.c.item)
)
_CUSTOMER = (
    update(customers)
    .where(customers.c.customer_id == bindparam("of_customer"))
    .values(
        completed=customers.c.completed + bindparam("more_completed"),
        cancelled=customers.c.cancelled + bindparam("more_cancelled"),
        paid_cents=customers.c.paid_cents + bindparam("more_paid"),
        refunded_cents=customers.c.refunded_cents + bindparam("more_refunded"),
    )
    .returning(customers.c.customer_id)
)


@events.on(TicketsHeld, group="sales", inbox=True)
async def count_held(event: TicketsHeld, *, db: Database = given(Database)) -> None:
    await _count_sales(db, event.tickets, sold=False)
    await _note(db, "sales", "tickets.held", event.order_id)


@events.on(PurchaseCompleted, group="sales", inbox=True)
async def count_sold(event: PurchaseCompleted, *, db: Database = given(Database)) -> None:
    await _count_sales(db, event.tickets, sold=True)
    await _note(db, "sales", "purchase.completed", event.order_id)


@events.on(PaymentCaptured, group="customers", inbox=True)
async def count_paid(event: PaymentCaptured, *, db: Database = given(Database)) -> None:
    await _count_customer(db, event.customer_id, paid=event.amount_cents)
    await _note(db, "customers", "payment.captured", event.order_id)


@events.on(PaymentRefunded, group="customers", inbox=True)
async def count_refunded(event: PaymentRefunded, *, db: Database = given(Database)) -> None:
    await _count_customer(db, event.customer_id, refunded=event.amount_cents)
    await _note(db, "customers", "payment.refunded", event.order_id)


@events.on(PurchaseCompleted, group="customers", inbox=True)
async def count_completed(event: PurchaseCompleted, *, db: Database = given(Database)) -> None:
    await _count_customer(db, event.customer_id, completed=1)
    await _note(db, "customers", "purchase.completed", event.order_id)


@events.on(PurchaseCancelled, group="customers", inbox=True)
async def count_cancelled(event: PurchaseCancelled, *, db: Database = given(Database)) -> None:
    await _count_customer(db, event.customer_id, cancelled=1)
    await _note(db, "customers", "purchase.cancelled", event.order_id)


@events.on(PurchaseCompleted, group="receipts", inbox=True)
async def send_receipt(event: PurchaseCompleted, *, db: Database = given(Database)) -> None:
    bought = ", ".join(f"{tickets.quantity} x {tickets.item}" for tickets in event.tickets)
    text = f"{event.customer_id}: {bought}. Paid {event.amount_cents / 100:,.2f}. Enjoy the show!"
    await db.write(_RECEIPT, {"order_id": event.order_id, "amount_cents": event.amount_cents, "text": text})
    await _note(db, "receipts", "purchase.completed", event.order_id)


async def _count_sales(db: Database, tickets: Iterable[Tickets], *, sold: bool) -> None:
    # In the order of items: two handlers that lock the same rows in another order would wait for each other.
    for line in sorted(tickets, key=lambda line: line.item):
        row = {
            "of_item": line.item,
            "more_held": 0 if sold else line.quantity,
            "more_sold": line.quantity if sold else 0,
            "more_revenue": line.quantity * line.price_cents if sold else 0,
        }
        await _add(db, _SALES, row)


async def _count_customer(
    db: Database, customer: str, *, completed: int = 0, cancelled: int = 0, paid: int = 0, refunded: int = 0
) -> None:
    row = {
        "of_customer": customer,
        "more_completed": completed,
        "more_cancelled": cancelled,
        "more_paid": paid,
        "more_refunded": refunded,
    }
    await _add(db, _CUSTOMER, row)


async def _add(db: Database, statement: ReturningUpdate[tuple[str]], row: dict[str, Any]) -> None:
    """Add to a row that the office made when it opened: one that is gone would swallow every count."""
    async with db.transaction() as session:
        if await session.scalar(statement, row) is None:
            msg = f"no row to add {row} to; it was there when the office put its items on sale"
            raise LookupError(msg)


async def _note(db: Database, group: str, event_type: str, order_id: str) -> None:
    await db.write(_HANDLED, {"consumer": group, "event_type": event_type, "order_id": order_id})
