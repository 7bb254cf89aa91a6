"""Handlers by example: what a scenario runs, what it shows, and what it refuses."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import Retry, given
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import DecodeError, Event, EventRouter, Metadata
from mainstay.events.testing import scenario

METADATA = sa.MetaData()
PAID = sa.Table("paid", METADATA, sa.Column("order", sa.Text, primary_key=True), sa.Column("amount", sa.Integer))
PAY = sa.insert(PAID)
AMOUNT = sa.select(PAID.c.amount).where(PAID.c.order == sa.bindparam("of"))


class OrderPaid(Event, type="order.paid", version="2.0", key="order"):
    order: str
    amount: int


class OrderPaidOnce(Event, type="order.paid", version="1.0", key="order"):
    order: str
    price: int


class OrderPaidLater(Event, type="order.paid", version="3.0", key="order"):
    order: str


class OrderCancelled(Event, type="order.cancelled", key="order"):
    order: str


class RefundIssued(Event, type="refund.issued", key="order"):
    order: str
    amount: int


events = EventRouter()


@events.upcast(OrderPaid, from_=1)
def renamed(old: dict[str, object]) -> dict[str, object]:
    return {"order": old["order"], "amount": old["price"]}


@events.on(OrderPaid, group="refunds", inbox=True)
async def remember(event: OrderPaid, *, db: Database = given(Database)) -> None:
    await db.write(PAY, {"order": event.order, "amount": event.amount})


@events.on(OrderCancelled, group="refunds", inbox=True)
async def refund(event: OrderCancelled, *, db: Database = given(Database)) -> None:
    (row,) = await db.read(AMOUNT, {"of": event.order})
    await events.publish(RefundIssued(order=event.order, amount=row.amount))


async def test_what_handlers_publish_is_compared():
    """What was given counts as history: only what is published after it is looked at."""
    of_a = RefundIssued(order="a", amount=7)
    paid = scenario(events, tables=METADATA).given(OrderPaid(order="a", amount=7), OrderPaid(order="b", amount=8))
    await paid.when(OrderCancelled(order="a")).then(published=[of_a])
    await paid.given(OrderCancelled(order="a")).when(OrderPaid(order="c", amount=1)).then(published=[])


async def test_a_difference_is_shown_event_by_event():
    """The message has a line for each event, and says which is missing and which is too many."""
    paid = scenario(events, tables=METADATA).given(OrderPaid(order="a", amount=7)).when(OrderCancelled(order="a"))
    with pytest.raises(AssertionError) as failed:
        await paid.then(published=[RefundIssued(order="a", amount=8)])
    assert "- RefundIssued(order='a', amount=8)" in str(failed.value)
    assert "+ RefundIssued(order='a', amount=7)" in str(failed.value)
    with pytest.raises(AssertionError, match=r"\+ refund\.issued 1\.0 \{\"order\":\"a\",\"amount\":7\}"):
        await paid.then(published=[])


async def test_what_handlers_write_can_be_looked_at():
    """An older version of an event comes through its upcaster, as in production."""

    async def check(db: Database) -> None:
        assert [row.amount for row in await db.read(AMOUNT, {"of": "a"})] == [12]

    await scenario(events, tables=METADATA).when(OrderPaidOnce(order="a", price=12)).then(check=check)


async def test_a_failure_is_expected_by_its_class_and_text():
    """Another error, another text and no error at all are told from it."""
    cancelled = scenario(events, tables=METADATA).when(OrderCancelled(order="a"))
    await cancelled.then_fails(ValueError, "not enough values")
    await cancelled.then_fails()
    with pytest.raises(AssertionError, match=r"expected KeyError; group refunds gave up order\.cancelled: ValueError"):
        await cancelled.then_fails(KeyError)
    with pytest.raises(AssertionError, match="expected ValueError that says 'too many'"):
        await cancelled.then_fails(ValueError, "too many")
    with pytest.raises(AssertionError, match=r"gave up order\.cancelled: ValueError: not enough"):
        await cancelled.then(published=[])
    with pytest.raises(AssertionError, match="no handler failed with Exception"):
        await scenario(events, tables=METADATA).when(OrderPaid(order="a", amount=1)).then_fails()
    with pytest.raises(AssertionError, match=r"given OrderCancelled\(order='a'\): group refunds gave up"):
        await scenario(events, tables=METADATA).given(OrderCancelled(order="a")).then()


async def test_an_event_that_is_refused_before_its_handler_fails_too():
    """A version that no handler reads is a dead letter, as in production."""
    newer = scenario(events, tables=METADATA).when(OrderPaidLater(order="a"))
    await newer.then_fails(DecodeError, "declare a class")
    with pytest.raises(AssertionError, match="expected ValueError"):
        await newer.then_fails(ValueError)


async def test_retries_wait_in_virtual_time():
    """Hours between two attempts take no time, and a handler without needs has no database."""
    router = EventRouter()
    attempts: list[int] = []

    @router.on(OrderCancelled, group="slow", retry=Retry(attempts=3, wait=lambda _state: 3600.0))
    async def handle(_event: OrderCancelled, meta: Metadata) -> None:
        attempts.append(meta.attempt)
        if meta.attempt < 3:
            msg = "not yet"
            raise RuntimeError(msg)

    slow = scenario(router)
    assert not slow._needed()
    await slow.when(OrderCancelled(order="a")).then()
    assert attempts == [1, 2, 3]


async def test_a_parked_key_is_a_failure():
    """Also that is where an event ends that keeps failing."""
    router = EventRouter()

    @router.on(OrderCancelled, group="parks", on_failure="park", retry=Retry(attempts=1))
    async def handle(_event: OrderCancelled) -> None:
        msg = "out of stock"
        raise RuntimeError(msg)

    await scenario(router).when(OrderCancelled(order="a")).then_fails(RuntimeError, "out of stock")


async def test_a_scenario_has_the_modules_that_it_is_given():
    """A database module among them takes the place of the one that would be made."""
    mine = DatabaseModule.for_root(DatabaseSettings(url=SecretStr("sqlite+aiosqlite:///:memory:"), pool_size=3))

    async def check(db: Database) -> None:
        assert db.engine.pool.status().startswith("Pool size: 3 ")

    await scenario(events, modules=[mine], tables=METADATA).when(OrderPaid(order="a", amount=1)).then(check=check)


async def test_a_batch_handler_is_given_a_batch() -> None:
    """As in production: what it does with several events is what an example is to show, also where it fails."""
    router = EventRouter()

    @router.on_batch(OrderPaid, group="sums", retry=Retry(attempts=2))
    async def add_up(paid: list[OrderPaid], metas: list[Metadata]) -> None:
        metas.clear()
        if any(event.amount < 0 for event in paid):
            msg = f"{len(paid)} with a negative one"
            raise ValueError(msg)
        await router.publish(RefundIssued(order=paid[0].order, amount=sum(event.amount for event in paid)))

    three = [OrderPaid(order="a", amount=amount) for amount in (1, 2, 3)]
    await scenario(router).when(*three).then(published=[RefundIssued(order="a", amount=6)])
    bad = OrderPaid(order="a", amount=-1)
    await scenario(router).given(*three).when(*three, bad).then_fails(ValueError, "1 with a negative one")
