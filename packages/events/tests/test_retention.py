"""What is deleted from the log, and what stays: nothing goes without a word that a group has yet to read."""

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY
from pydantic import SecretStr

from mainstay.core import SYSTEM_CLOCK, App, Drain
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.events import EventPublisher, EventRouter, EventsModule, EventsSettings
from mainstay.events._retention import LogRetention
from mainstay.events.tables import LOG, MEMBERS, OFFSETS
from packages.events.tests.test_sql import Line, collecting

DAY = 86_400


def service(url: str, *routers: EventRouter, **settings: Any) -> App:
    """An App on the sql transport that keeps events for a week."""
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url)))
    events = EventsModule.for_root(EventsSettings(partitions=1, **settings))
    return App(database, events, EventsModule.for_feature(*routers))


async def publish(app: App, *numbers: int) -> None:
    """These events."""
    await app.get(EventPublisher).publish_batch([Line(name="a", number=number) for number in numbers])


async def pass_days(app: App, days: int) -> None:
    """Make everything so much older."""
    async with app.get(Database).transaction() as session:
        await session.execute(sa.update(LOG).values(created_at=LOG.c.created_at - days * DAY))
        await session.execute(sa.update(MEMBERS).values(expires_at=MEMBERS.c.expires_at - days * DAY))


async def left(app: App) -> int:
    """How many events the log holds."""
    return int((await app.get(Database).read(sa.select(sa.func.count()).select_from(LOG)))[0][0])


def retention(app: App, *mine: tuple[str, str]) -> LogRetention:
    """What deletes, in a process with these groups."""
    return LogRetention(app.get(Database), days=7.0, mine=mine, clock=SYSTEM_CLOCK)


def missed(group: str) -> float:
    """The metric of a group."""
    return REGISTRY.get_sample_value("mainstay_events_missed_total", {"group": group}) or 0.0


async def read_once(url: str, group: str, count: int) -> None:
    """Let a group handle so many events and leave."""
    seen: list[int] = []
    async with service(url, collecting(seen, group=group)).running(serve=True):
        await eventually(lambda: len(seen) == count)


async def test_an_old_event_stays_until_every_group_has_read_it(database_url: str, prefix: str) -> None:
    """What both have read goes; what one of them has not stays, however old it is, and goes once it has."""
    async with service(database_url) as app:
        await publish(app, 1, 2)
        for group in (prefix, f"{prefix}-other"):
            await read_once(database_url, group, 2)
        await publish(app, 3, 4)
        await read_once(database_url, f"{prefix}-other", 2)
        await pass_days(app, 8)
        sweeper = retention(app, (prefix, "sql"))
        await sweeper.sweep(Drain())
        assert await left(app) == 2
        await read_once(database_url, prefix, 2)
        await sweeper.sweep(Drain())
        assert await left(app) == 0
        assert missed(prefix) == 0


async def test_a_group_of_this_process_that_never_read_anything_keeps_what_it_is_to_read(
    database_url: str, prefix: str
) -> None:
    """A worker that is started for the first time handles what waits for it, and does not delete it before."""
    seen: list[int] = []
    async with service(database_url) as app:
        await publish(app, *range(5))
        await pass_days(app, 8)
        await retention(app, (prefix, "sql")).sweep(Drain())
        assert await left(app) == 5
        async with service(database_url, collecting(seen, group=prefix)).running(serve=True):
            await eventually(lambda: len(seen) == 5)
        await retention(app).sweep(Drain())
        assert await left(app) == 0


async def test_after_a_long_stop_what_was_unread_is_handled_and_then_deleted(database_url: str, prefix: str) -> None:
    """A start sweeps at once: before the first read it must leave what the groups, also of others, have yet to read."""
    seen: list[int] = []
    other = f"{prefix}-other"
    async with service(database_url) as app:
        await publish(app, 0)
        await read_once(database_url, prefix, 1)
        await read_once(database_url, other, 1)
        await publish(app, *range(1, 50))
        await pass_days(app, 30)
        async with service(database_url, collecting(seen, group=prefix)).running(serve=True):
            await eventually(lambda: len(seen) == 49)
        assert await left(app) == 49  # the other group's process is still to be started
        await read_once(database_url, other, 49)
        await retention(app).sweep(Drain())
        assert await left(app) == 0


async def test_a_group_that_was_given_up_is_named_and_counted(
    database_url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps nothing for ever: after the time that events are kept it is passed over, not without a word."""
    async with service(database_url) as app:
        await publish(app, 1)
        await read_once(database_url, prefix, 1)
        await publish(app, 2, 3, 4)
        await pass_days(app, 8)
        module = next(module for module in app.modules if isinstance(module, EventsModule))
        assert any(f"group {prefix} has had no member" in found for found in await module.inspect(app))
        sweeper = retention(app)
        await sweeper.sweep(Drain())
        assert await left(app) == 3  # its process may be about to start
        sweeper._began_at -= 3601
        await sweeper.sweep(Drain())
        assert await left(app) == 0
        assert missed(prefix) == 3
        assert f"group {prefix} has had no member that reads topic sql" in caplog.text
        await publish(app, 5)
        await pass_days(app, 8)
        caplog.clear()
        await sweeper.sweep(Drain())
        assert (await left(app), missed(prefix), caplog.text) == (0, 4, "")  # it is said once a day
        async with app.get(Database).transaction() as session:  # as the finding says
            for table in (OFFSETS, MEMBERS):
                await session.execute(sa.delete(table).where(table.c.group_name == prefix, table.c.topic == "sql"))
        assert not any(prefix in found for found in await module.inspect(app))
        await publish(app, 6)
        await pass_days(app, 8)
        await retention(app).sweep(Drain())
        assert (await left(app), missed(prefix)) == (0, 4)


async def test_a_sweep_goes_on_behind_what_it_spares(sqlite_url: str, prefix: str, monkeypatch: Any) -> None:
    """Much that one group has yet to read does not keep the sweep from what lies behind it."""
    monkeypatch.setattr("mainstay.events._retention._MOST_SPARED", 3_000)
    rows = [
        {"topic": topic, "partition": 0, "key": b"", "value": b"", "headers": "[]", "created_at": 1}
        for topic in ("kept", "gone")
        for _ in range(5_000)
    ]
    async with service(sqlite_url) as app:
        await app.get(Database).write(sa.insert(LOG), rows)
        sweeper = retention(app, (prefix, "kept"))
        for _ in range(4):
            await sweeper.sweep(Drain())
        assert await left(app) == 5_000
        topics = await app.get(Database).read(sa.select(LOG.c.topic).distinct())
        assert [row.topic for row in topics] == ["kept"]


async def test_young_events_stay(database_url: str) -> None:
    """Whether it was read or not; and while it is stopping a sweep ends soon."""
    async with service(database_url) as app:
        await publish(app, *range(10))
        async with app.get(Database).transaction() as session:
            old = sa.update(LOG).where(LOG.c.position <= 4).values(created_at=LOG.c.created_at - 8 * DAY)
            await session.execute(old)
        drain = Drain()
        sweeping = asyncio.create_task(retention(app).run(drain))

        async def swept() -> bool:
            return await left(app) == 6

        await eventually(swept)
        drain.begin()
        await sweeping
        assert await app.get(Database).read(sa.select(OFFSETS).where(OFFSETS.c.group_name != "")) == []
