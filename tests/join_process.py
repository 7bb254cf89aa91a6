"""A service whose events begin its runs and continue them, to be killed; configured by the environment. Not a test."""

import asyncio
import os

import sqlalchemy as sa

from mainstay.core import App, given
from mainstay.database import Database, DatabaseModule
from mainstay.events import Event, EventRouter, EventsModule
from mainstay.workflow import WorkflowModule, WorkflowRouter

LEDGER = sa.Table(
    "join_ledger",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("order_id", sa.Text),
)

RUN_OF = sa.text("SELECT id FROM mainstay_workflow_runs WHERE input = :input")
GROUP = os.environ.get("JOIN_GROUP", "join")

events, flows = EventRouter(), WorkflowRouter()
packed = flows.signal("packed", str)


class OrderPlaced(Event, type="join.placed", version="1.0", key="order_id"):
    """Begins a run."""

    order_id: str


class OrderPacked(Event, type="join.packed", version="1.0", key="order_id"):
    """Continues it."""

    order_id: str


class OrderDone(Event, type="join.done", version="1.0", key="order_id"):
    """The run has ended."""

    order_id: str


@flows.step(harmless=True)
async def look(order_id: str) -> str:
    """Take some time."""
    await asyncio.sleep(0.01)
    return order_id


@flows.workflow(name="deliver")
async def deliver(order_id: str) -> str:
    """Wait until the order is packed, and tell."""
    await look(order_id)
    told = await packed.wait()
    await events.publish(OrderDone(order_id=order_id))
    return told


@events.on(OrderPlaced, group=GROUP, inbox=True)
async def placed(event: OrderPlaced) -> None:
    """Without an id of our own a second delivery would be a second run."""
    await deliver.start(event.order_id)


@events.on(OrderPacked, group=GROUP, inbox=True)
async def was_packed(event: OrderPacked, *, db: Database = given(Database)) -> None:
    """Without an id of our own a second delivery would be a second signal."""
    (run,) = await db.read(RUN_OF, {"input": f'{{"order_id":"{event.order_id}"}}'})
    await packed.send(run.id, event.order_id)


@events.on(OrderDone, group=f"{GROUP}-ledger", inbox=True)
async def done(event: OrderDone, *, db: Database = given(Database)) -> None:
    """Count the ends."""
    await db.write(sa.insert(LEDGER), {"order_id": event.order_id})


def service() -> App:
    """The service."""
    return App(
        DatabaseModule.for_root(),
        EventsModule.for_root(),
        EventsModule.for_feature(events),
        WorkflowModule.for_root(),
        WorkflowModule.for_feature(flows),
    )


if __name__ == "__main__":
    service().run()
