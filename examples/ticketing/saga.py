"""A purchase, from acceptance to receipt, and back again when something stands in the way.

    register ─ hold ─ charge ─ book ─ issue ─ send_receipt      completed
    cancel ─── release ─ refund                                 cancelled, from right to left

Every step but the charge writes to the office's database and nowhere else: state, audit entry, event and the record of
the step share one commit. The charge happens at the provider, who knows it by the step's key, whatever the attempt.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from sqlalchemy import and_, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from mainstay.audit import AuditTrail
from mainstay.core import FullJitter, MainstayError, Retry, given
from mainstay.database import Database
from mainstay.events import EventRouter
from mainstay.workflow import Done, StepFailed, Unknown, WorkflowRouter, current_compensation, current_step
from ticketing.messages import (
    PaymentCaptured,
    PaymentRefunded,
    PurchaseCancelled,
    PurchaseCompleted,
    Tickets,
    TicketsHeld,
)
from ticketing.payments import Charged, Declined, PaymentProvider
from ticketing.purchases import Purchase
from ticketing.tables import items, payments, purchases, tickets

events, flows, audit = EventRouter(), WorkflowRouter(), AuditTrail()


class SoldOut(MainstayError):
    """There are not enough tickets left."""

    code = "BIZ_SOLD_OUT"
    status = 409
    title = "Sold out"
    no_effect = True


class Order(BaseModel):
    """What a run is about: the purchase, and the line of the file that it came from."""

    model_config = ConfigDict(frozen=True)

    line: int
    purchase: Purchase

    @property
    def id(self) -> str:
        return self.purchase.order_id

    def tickets(self) -> tuple[Tickets, ...]:
        return tuple(
            Tickets(item=line.item, quantity=line.quantity, price_cents=line.cents) for line in self.purchase.lines
        )


def _resource(order: Order) -> str:
    return f"purchase/{order.id}"


# The steps


@flows.step(transactional=True)
@audit.record("purchase.accepted", resource=_resource)
async def register(order: Order, *, db: Database = given(Database)) -> None:
    await db.write(
        insert(purchases),
        {
            "order_id": order.id,
            "line": order.line,
            "customer_id": order.purchase.customer_id,
            "total_cents": order.purchase.total_cents,
            "state": "accepted",
        },
    )


@register.compensation
@audit.record("purchase.cancelled", resource=_resource)
async def cancel(_outcome: Done[None] | Unknown, order: Order, *, db: Database = given(Database)) -> None:
    async with db.transaction() as session:
        reason = await session.scalar(select(purchases.c.reason).where(purchases.c.order_id == order.id))
        await _set_state(session, order, "cancelled")
    await events.publish(
        PurchaseCancelled(order_id=order.id, customer_id=order.purchase.customer_id, reason=reason or "cancelled")
    )


@flows.step(transactional=True, failed_on=(SoldOut,))
@audit.record("tickets.held", resource=_resource)
async def hold(order: Order, *, db: Database = given(Database)) -> None:
    async with db.transaction() as session:
        # In the order of items: two purchases that lock the same rows in another order would wait for each other.
        for number, line in sorted(enumerate(order.purchase.lines), key=lambda entry: entry[1].item):
            taken = (
                update(items)
                .where(items.c.item == line.item, items.c.free >= line.quantity)
                .values(free=items.c.free - line.quantity)
                .returning(items.c.item)
            )
            if await session.scalar(taken) is None:
                msg = f"{line.item} is sold out: {line.quantity} were wanted"
                raise SoldOut(msg)
            free = select(tickets.c.serial).where(tickets.c.item == line.item, tickets.c.state == "free")
            await session.execute(
                update(tickets)
                .where(
                    tickets.c.item == line.item,
                    tickets.c.serial.in_(free.order_by(tickets.c.serial).limit(line.quantity)),
                )
                .values(state="held", order_id=order.id, line=number, price_cents=line.cents)
            )
        await _set_state(session, order, "held", tickets_held=sum(line.quantity for line in order.purchase.lines))
    await events.publish(TicketsHeld(order_id=order.id, tickets=order.tickets()))


@hold.compensation
@audit.record("tickets.released", resource=_resource)
async def release(_outcome: Done[None] | Unknown, order: Order, *, db: Database = given(Database)) -> None:
    async with db.transaction() as session:
        for item in sorted({line.item for line in order.purchase.lines}):
            mine = and_(tickets.c.item == item, tickets.c.order_id == order.id)
            count = select(func.count()).select_from(tickets).where(mine).scalar_subquery()
            await session.execute(update(items).where(items.c.item == item).values(free=items.c.free + count))
            await session.execute(
                update(tickets).where(mine).values(state="free", order_id=None, line=None, price_cents=None)
            )


@flows.step(
    retry=Retry(attempts=4, wait=FullJitter(initial_seconds=0.2, max_seconds=2.0)),
    timeout_seconds=10,
    failed_on=(Declined,),
    one_call=True,
)
async def charge(order: Order, *, provider: PaymentProvider = given(PaymentProvider)) -> Charged:
    """The only step that shares no commit: a crash in it leaves an outcome that is unknown."""
    return await provider.charge(current_step().key, order.id, order.purchase.total_cents)


@charge.compensation
async def refund(
    _outcome: Done[Charged] | Unknown,
    order: Order,
    *,
    provider: PaymentProvider = given(PaymentProvider),
    db: Database = given(Database),
) -> None:
    """Whatever became of the charge: afterwards the money is back, and the key is spent.

    The provider says what had been charged under the key. What the office had not heard of until now it books too, so
    that both ledgers tell the same story.
    """
    key = current_compensation().undoes
    settled = await provider.refund(key, order.id)
    if settled.charged_cents:
        async with db.transaction():
            await _book(db, order, key, "charge", settled.charged_cents)
            await _book(db, order, key, "refund", settled.refunded_cents)


@flows.step(transactional=True, harmless=True)
async def book(order: Order, charged: Charged, *, db: Database = given(Database)) -> None:
    """Into the office's ledger; `refund` is what undoes it."""
    await _book(db, order, charged.key, "charge", charged.amount_cents)
    async with db.transaction() as session:
        await _set_state(session, order, "charged")


@flows.step(transactional=True, harmless=True)
@audit.record("tickets.issued", resource=_resource)
async def issue(order: Order, *, db: Database = given(Database)) -> None:
    """From here they are the customer's; `release` takes them back in any state."""
    async with db.transaction() as session:
        await session.execute(update(tickets).where(tickets.c.order_id == order.id).values(state="issued"))
        await _set_state(session, order, "issued")


@flows.step(transactional=True, harmless=True)
@audit.record("purchase.completed", resource=_resource)
async def send_receipt(order: Order, *, db: Database = given(Database)) -> None:
    """The purchase is complete with the event from which the receipt is written."""
    async with db.transaction() as session:
        await _set_state(session, order, "completed")
    await events.publish(
        PurchaseCompleted(
            order_id=order.id,
            customer_id=order.purchase.customer_id,
            amount_cents=order.purchase.total_cents,
            tickets=order.tickets(),
        )
    )


@flows.step(transactional=True, harmless=True)
async def note_reason(order: Order, reason: str, *, db: Database = given(Database)) -> None:
    async with db.transaction() as session:
        await session.execute(update(purchases).where(purchases.c.order_id == order.id).values(reason=reason))


@flows.workflow(name="sell-tickets", version=1)
async def sell(order: Order) -> None:
    await register(order)
    try:
        await hold(order)
        charged = await charge(order)
        await book(order, charged)
        await issue(order)
        await send_receipt(order)
    except StepFailed as failure:
        await note_reason(order, _reason(failure))
        raise


def _reason(failure: StepFailed) -> str:
    match failure.error_code:
        case "BIZ_SOLD_OUT":
            return "sold out"
        case "BIZ_DECLINED":
            return "payment declined"
        case _:
            return f"{failure.step} {failure.outcome}"


async def _set_state(session: AsyncSession, order: Order, state: str, **more: int) -> None:
    await session.execute(update(purchases).where(purchases.c.order_id == order.id).values(state=state, **more))


async def _book(db: Database, order: Order, key: str, kind: str, cents: int) -> None:
    """A confirmed movement of money, into ledger, audit trail and events; once, however often it is confirmed."""
    async with db.transaction() as session:
        known = select(payments.c.key).where(payments.c.key == key, payments.c.kind == kind)
        if await session.scalar(known) is not None:
            return
        await session.execute(insert(payments), {"key": key, "kind": kind, "order_id": order.id, "amount_cents": cents})
        moved = {"order_id": order.id, "customer_id": order.purchase.customer_id, "amount_cents": cents}
        event = PaymentCaptured(**moved) if kind == "charge" else PaymentRefunded(**moved)
        action = "payment.captured" if kind == "charge" else "payment.refunded"
        await audit.write(action, resource=_resource(order), detail={"cents": cents})
        await events.publish(event)
