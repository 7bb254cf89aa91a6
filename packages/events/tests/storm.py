"""Producers and consumers of the storm, each a process of its own, to be killed at any moment. Not a test."""

import asyncio
import os
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App, MainstayError, Retry, given
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import Event, EventPublisher, EventRouter, EventsModule, EventsSettings, Metadata

META = sa.MetaData()
PUBLISHED = sa.Table(
    "storm_published",
    META,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
)
EFFECTS = sa.Table(
    "storm_effects",
    META,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("key", sa.Text),
    sa.Column("number", sa.Integer),
)

AT_ONCE = 50
"""Events of one publication."""


class Fell(Event, type="storm.fell", version="1.0", key="key"):
    """A drop."""

    key: str
    number: int


class Odd(Event, type="storm.fell", version="1.0", key="key"):
    """As a publisher with another idea of the same type writes it: none that handles `Fell` can read it."""

    key: str
    number: str
    size: list[int]


class Ending(Event, type="storm.ending", version="1.0", key="key"):
    """What no process survives that handles it."""

    key: str


def is_refused(key: str, number: int) -> bool:
    """Whether the handler raises for it, however often it is tried."""
    return key.endswith("3") and number % 40 == 7


def is_odd(key: str, number: int) -> bool:
    """Whether it is published in a form that cannot be read."""
    return key.endswith("5") and number % 50 == 11


def service(options: dict[str, Any], *routers: EventRouter) -> App:
    """The service, in any of its processes."""
    settings = EventsSettings(
        transport=options["transport"],
        kafka_servers=options["kafka"],
        topics=dict.fromkeys(("storm.fell", "storm.ending"), options["topic"]),
        partitions=6,
        lease_seconds=2.0,
        drain_seconds=2.0,
        retry_attempts=2,
        retry_initial_seconds=0.05,
        retry_max_seconds=0.2,
    )
    return App(
        DatabaseModule.for_root(DatabaseSettings(url=SecretStr(options["url"]))),
        EventsModule.for_root(settings),
        EventsModule.for_feature(*routers),
    )


async def publish_next(app: App, keys: list[str], each: int) -> bool:
    """Publish the next of each key that has not all, in one commit with the note of it; whether there was any."""
    database, publisher = app.get(Database), app.get(EventPublisher)
    async with database.transaction() as session:
        last = sa.select(PUBLISHED.c.key, sa.func.max(PUBLISHED.c.number)).where(PUBLISHED.c.key.in_(keys))
        numbers: dict[str, int] = dict((await session.execute(last.group_by(PUBLISHED.c.key))).tuples().all())
        rows = [(key, numbers.get(key, -1) + 1) for key in keys if numbers.get(key, -1) + 1 < each]
        if not rows:
            return False
        await session.execute(sa.insert(PUBLISHED), [{"key": key, "number": number} for key, number in rows])
        await publisher.publish_batch(
            [
                Odd(key=key, number=f"number {number}", size=[])
                if is_odd(key, number)
                else Fell(key=key, number=number)
                for key, number in rows
            ]
        )
    return True


async def produce(options: dict[str, Any]) -> None:
    """Publish all of this producer's events, and relay."""
    keys: list[str] = options["keys"]
    async with service(options).running(serve=True) as app:
        for start in range(0, len(keys), AT_ONCE):
            more = True
            while more:
                try:
                    more = await publish_next(app, keys[start : start + AT_ONCE], options["each"])
                except MainstayError:  # the database is away, or it is unknown what it has committed: look again
                    await asyncio.sleep(0.2)
                await asyncio.sleep(options["pause"])
        await asyncio.sleep(3600)


async def consume(options: dict[str, Any]) -> None:
    """Write an effect for each event."""
    events = EventRouter()

    @events.on(Fell, group="storm", inbox=True, on_failure="dead-letter", retry=Retry(attempts=2))
    async def record(event: Fell, *, db: Database = given(Database)) -> None:
        async with db.transaction() as session:
            await session.execute(sa.insert(EFFECTS).values(key=event.key, number=event.number))
        if is_refused(event.key, event.number):
            msg = "for good"
            raise ValueError(msg)

    @events.on(Ending, group="storm", on_failure="dead-letter")
    async def end(_event: Ending, _meta: Metadata) -> None:
        os._exit(1)

    async with service(options, events).running(serve=True):
        await asyncio.sleep(3600)


def run(options: dict[str, Any]) -> None:
    """What a forked process does."""
    asyncio.run(produce(options) if "keys" in options else consume(options))
