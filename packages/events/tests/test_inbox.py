"""Handlers with an inbox beside everybody else who needs the database."""

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App, bind_journal
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseBusy, DatabaseModule, DatabaseSettings
from mainstay.events import (
    DeadLetters,
    Event,
    EventConsumers,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
)
from mainstay.events._inbox import handlers_at_once
from mainstay.events._sql import SqlTransport
from mainstay.events.metadata import Outgoing
from mainstay.events.tables import INBOX, INSERT_INBOX
from packages.events.tests.test_publishing import Journal
from packages.events.tests.test_sql import Line, Reading


class Slow:
    """A feature with an inbox whose handlers wait for a gate; counts them."""

    def __init__(self) -> None:
        self.router = EventRouter()
        self.gate = asyncio.Event()
        self.running = self.most = self.begun = self.done = 0

        @self.router.on(Line, group="slow", inbox=True)
        async def handle(_event: Line) -> None:
            self.begun += 1
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await self.gate.wait()
            finally:
                self.running -= 1
            self.done += 1


def service(url: str, *routers: EventRouter, pool: int, wait: float = 5.0, **settings: Any) -> App:
    """An App with a pool of so many connections."""
    database = DatabaseSettings(url=SecretStr(url), pool_size=pool, pool_timeout_seconds=wait)
    return App(
        DatabaseModule.for_root(database),
        EventsModule.for_root(EventsSettings(**settings)),
        EventsModule.for_feature(*routers),
    )


async def publish(app: App, count: int) -> None:
    """So many events, each with a key of its own."""
    await app.get(EventPublisher).publish_batch([Line(name=f"{number}", number=number) for number in range(count)])


async def test_slow_handlers_with_an_inbox_leave_connections_to_others(postgres_url: str) -> None:
    """As many run as three quarters of the pool; requests find a connection, and no event fails for want of one."""
    slow = Slow()
    app = service(postgres_url, slow.router, pool=4, partitions=2)
    async with app.running(serve=True):
        await publish(app, 40)
        await eventually(lambda: slow.running == 3, what="three of four connections")
        for _ in range(20):
            async with app.get(Database).transaction() as session:
                await session.execute(sa.select(1))
        consumers = app.get(EventConsumers)
        assert slow.most == 3
        assert (await consumers.health()).detail == "group slow: 2 partitions"
        slow.gate.set()
        await eventually(lambda: slow.done == 40)
    assert slow.begun == 40


async def test_on_sqlite_a_write_waits_for_one_handler_with_an_inbox_and_not_for_all(sqlite_url: str) -> None:
    """The handlers take the one writer's turn one after the other, and another caller has the next."""
    slow = Slow()
    app = service(sqlite_url, slow.router, pool=10)
    async with app.running(serve=True):
        await publish(app, 40)
        await eventually(lambda: slow.running == 1)

        async def write() -> int:
            async with app.get(Database).transaction():
                return slow.begun

        writing = asyncio.create_task(write())
        await asyncio.sleep(0)  # it has asked for its turn
        slow.gate.set()
        assert await writing <= 2
        assert slow.most == 1
        await eventually(lambda: slow.done == 40)


async def test_a_database_that_is_too_busy_to_be_read_is_no_lost_transport(postgres_url: str) -> None:
    """Where others have all connections the next look finds the same; only after long the transport counts as lost."""
    async with service(postgres_url, pool=1, wait=0.05, partitions=1) as app, AsyncExitStack() as stack:
        await publish(app, 3)
        reading = Reading()
        source = await stack.enter_async_context(app.get(SqlTransport).source("g", ["sql"], reading))
        while not reading.held:
            await source.fetch([])
        async with app.get(Database).engine.connect():
            assert await source.fetch(reading.held) == {}
            source._read_at = float("-inf")
            with pytest.raises(DatabaseBusy):
                await source.fetch(reading.held)
        found: list[int] = []
        while len(found) < 3:
            for records in (await source.fetch(reading.held)).values():
                found += [Line.model_validate_json(record.value or b"").number for record in records]
        assert found == [0, 1, 2]


async def test_an_event_that_another_process_is_in_the_middle_of_is_not_waited_for(postgres_url: str) -> None:
    """Its connection goes back at once, no attempt is spent, and when the other has committed it is a duplicate."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Line, group="g", inbox=True)
    async def handle(event: Line) -> None:
        seen.append(event.number)

    async with service(postgres_url, events, pool=4, retry_attempts=1, retry_max_seconds=0.1) as app:
        await publish(app, 2)
        publisher = app.get(EventPublisher)
        ids = [await publisher.publish(Line(name="a", number=2)), await publisher.publish(Line(name="b", number=3))]
        database = app.get(Database)

        async with database.transaction() as session:
            for id_ in ids:
                note = {"group_name": "g", "event_id": f"mainstay\n{id_}"}
                await session.execute(INSERT_INBOX["postgresql"], note)
            async with service(postgres_url, events_of(events), pool=4).running(serve=True):
                await eventually(lambda: sorted(seen) == [0, 1], what="those that no process is in the middle of")
        await publisher.publish(Line(name="a", number=4))
        async with service(postgres_url, events_of(events), pool=4).running(serve=True):
            await eventually(lambda: sorted(seen) == [0, 1, 4])
        assert len(await database.read(sa.select(INBOX))) == 5


async def test_a_client_that_froze_between_two_messages_of_a_statement_is_ended(postgres_url: str) -> None:
    """Its transaction does not count as idle, so that no timeout of the server ends it: who meets its event does."""
    seen: list[int] = []
    async with service(postgres_url, pool=4) as app:
        id_ = await app.get(EventPublisher).publish(Line(name="a", number=1))
        frozen = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))
        try:
            await frozen.execute("BEGIN")
            key = (
                f"SELECT pg_advisory_xact_lock(hashtextextended('g' || chr(10) || 'mainstay' || chr(10) || '{id_}', 0))"
            )
            await frozen.execute(key)
            await frozen.prepare("SELECT 1")  # and the message to run it does not come
            state = sa.text("SELECT state || wait_event FROM pg_stat_activity WHERE pid = :pid")
            rows = await app.get(Database).read(state, {"pid": frozen.get_server_pid()})
            assert rows[0][0] == "activeClientRead"
            database = DatabaseSettings(url=SecretStr(postgres_url), idle_transaction_seconds=1.0)
            events = EventsModule.for_root(EventsSettings(retry_max_seconds=0.2))
            router = EventRouter()

            @router.on(Line, group="g", inbox=True)
            async def handle(event: Line) -> None:
                seen.append(event.number)

            other = App(DatabaseModule.for_root(database), events, EventsModule.for_feature(router))
            async with other.running(serve=True):
                await eventually(lambda: seen == [1], what="the event of the frozen process")
        finally:
            frozen.terminate()


def events_of(router: EventRouter) -> EventRouter:
    """The same handlers for another App."""
    other = EventRouter()
    for subscription in router.subscriptions:
        other.add(subscription)
    return other


@pytest.mark.parametrize(
    ("dialect", "pool", "at_once"),
    [("sqlite", 10, 1), ("postgresql", 10, 7), ("postgresql", 2, 1), ("postgresql", 1, 1)],
)
def test_how_many_handlers_run_at_once_follows_from_the_pool(dialect: str, pool: int, at_once: int) -> None:
    """Three quarters of it; on SQLite there is one writer."""
    assert handlers_at_once(dialect, pool) == at_once


@pytest.mark.parametrize(("pool", "groups", "said"), [(1, 1, "set MAINSTAY_DATABASE_POOL_SIZE to 4"), (2, 1, "")])
async def test_check_says_where_the_pool_is_too_small(postgres_url: str, pool: int, groups: int, said: str) -> None:
    """With one connection a handler with an inbox leaves none to others."""
    routers: list[EventRouter] = []
    for number in range(groups):
        router = EventRouter()
        add(router, f"g{number}")
        routers.append(router)
    async with service(postgres_url, *routers, pool=pool) as app:
        module = next(module for module in app.modules if isinstance(module, EventsModule))
        found = "; ".join(await module.inspect(app))
        assert said in found
        assert bool(said) == bool(found)


def add(router: EventRouter, group: str) -> Callable[..., Any]:
    """A handler that does nothing."""

    @router.on(Line, group=group, inbox=True)
    async def handle(_event: Event) -> None: ...

    return handle


ROWS = sa.Table("rows", sa.MetaData(), sa.Column("number", sa.Integer, primary_key=True))
ADD = sa.insert(ROWS)


async def test_a_handler_in_batches_makes_a_repeated_event_one_effect(database_url: str) -> None:
    """Its writes and the note are one commit: a repeated event, or a call that fails, leaves nothing."""
    events = EventRouter()
    calls: list[int] = []
    app = service(database_url, events, pool=2, retry_initial_seconds=0.0)

    @events.on(Line, group="g", inbox="batch")
    async def handle(event: Line) -> None:
        await app.get(Database).write(ADD, {"number": event.number})
        calls.append(event.number)
        if calls == [1]:
            msg = "the first attempt fails"
            raise RuntimeError(msg)

    async with app.running(serve=True):
        database = app.get(Database)
        async with database.transaction() as session:
            await (await session.connection()).run_sync(ROWS.metadata.create_all)
        for _ in range(2):
            with bind_journal(Journal()):
                await events.publish(Line(name="a", number=1))
        await events.publish(Line(name="a", number=2))
        await eventually(lambda: 2 in calls)

        async def rows() -> bool:
            found = await database.read(sa.select(ROWS.c.number).order_by(ROWS.c.number))
            return [row.number for row in found] == [1, 2]

        await eventually(rows)
        assert calls == [1, 1, 1, 2]  # it failed, succeeded, and came again
        assert len(await database.read(sa.select(INBOX))) == 2
        assert await app.get(DeadLetters).list() == []


async def test_what_a_batch_refuses_is_the_event_s_own_failure(database_url: str) -> None:
    """A row of the handler's that is there already is no sign of a duplicate: the event is a dead letter."""
    events = EventRouter()
    app = service(database_url, events, pool=2, retry_attempts=1)

    @events.on(Line, group="g", inbox="batch", on_failure="dead-letter")
    async def handle(event: Line) -> None:
        await app.get(Database).write(ADD, {"number": event.number // 10})

    async with app.running(serve=True):
        async with app.get(Database).transaction() as session:
            await (await session.connection()).run_sync(ROWS.metadata.create_all)
        await app.get(EventPublisher).publish_batch([Line(name=f"{n}", number=n) for n in (10, 20, 21, 30)])

        async def settled() -> bool:
            noted = await app.get(Database).read(sa.select(INBOX))
            return len(noted) == 3 and len(await app.get(DeadLetters).list()) == 1

        await eventually(settled)
        found = await app.get(Database).read(sa.select(ROWS.c.number).order_by(ROWS.c.number))
        assert [row.number for row in found] == [1, 2, 3]


async def test_a_batch_and_its_notes_are_one_commit_and_what_was_handled_is_left_out(database_url: str) -> None:
    """A repeated event is not in the list, also where it comes twice at once; a call that fails leaves nothing."""
    events = EventRouter()
    calls: list[list[int]] = []
    app = service(database_url, events, pool=4, partitions=1, retry_initial_seconds=0.0)

    @events.on_batch(Line, group="g", inbox=True, size=4, wait_seconds=1.0)
    async def handle(lines: list[Line]) -> None:
        await app.get(Database).write(ADD, [{"number": line.number} for line in lines])
        calls.append([line.number for line in lines])
        if len(calls) == 1:
            msg = "the first attempt fails"
            raise RuntimeError(msg)

    async with app.running(serve=True):
        database = app.get(Database)
        async with database.transaction() as session:
            await (await session.connection()).run_sync(ROWS.metadata.create_all)
        for _ in range(2):  # four at once, of which two are there twice
            with bind_journal(Journal()):
                await events.publish_batch([Line(name="a", number=1), Line(name="a", number=2)])
        await eventually(lambda: len(calls) == 2)
        assert calls == [[1, 2], [1, 2]]
        with bind_journal(Journal()):
            await events.publish_batch([Line(name="a", number=1), Line(name="a", number=2)])
        await events.publish(Line(name="b", number=3))

        async def rows() -> bool:
            found = await database.read(sa.select(ROWS.c.number).order_by(ROWS.c.number))
            return [row.number for row in found] == [1, 2, 3]

        await eventually(rows)
        noted = await database.read(sa.select(INBOX))
        assert len(noted) == len({row.event_id for row in noted}) == 3
        assert await app.get(DeadLetters).list() == []
    assert calls[2:] == [[3]]


async def test_a_batch_that_another_process_is_in_the_middle_of_is_tried_again_at_no_cost(postgres_url: str) -> None:
    """It is waited for shortly, and the handler's own statements wait for locks as long as ever."""
    events = EventRouter()
    seen: list[int] = []
    waits: list[str] = []
    app = service(postgres_url, events, pool=4, partitions=1, retry_attempts=1, retry_max_seconds=0.05)

    @events.on_batch(Line, group="g", inbox=True, wait_seconds=0.0)
    async def handle(lines: list[Line]) -> None:
        waits.append((await app.get(Database).read(sa.text("SHOW lock_timeout")))[0][0])
        seen.extend(line.number for line in lines)

    async with app.running(serve=False):
        ids = [await app.get(EventPublisher).publish(Line(name="a", number=number)) for number in range(3)]
        database = app.get(Database)
        usual = (await database.read(sa.text("SHOW lock_timeout")))[0][0]
        async with database.transaction() as session:
            await session.execute(INSERT_INBOX["postgresql"], {"group_name": "g", "event_id": f"mainstay\n{ids[1]}"})
            async with service(postgres_url, events_of(events), pool=4, retry_attempts=1).running(serve=True) as other:
                consumers = other.get(EventConsumers).consumers
                await eventually(
                    lambda: any(each._dispatcher._failures.failing for each in consumers), what="a refusal"
                )
                assert seen == []
        await app.get(EventPublisher).publish(Line(name="b", number=3))
        async with service(postgres_url, events_of(events), pool=4).running(serve=True) as other:
            await eventually(lambda: sorted(seen) == [0, 2, 3], what="those that the other has not handled")
            assert await other.get(DeadLetters).list() == []
    assert set(waits) == {usual}


async def test_a_frozen_client_in_the_middle_of_a_batch_is_ended(postgres_url: str) -> None:
    """As one in the middle of a single event is."""
    seen: list[int] = []
    async with service(postgres_url, pool=4) as app:
        id_ = await app.get(EventPublisher).publish(Line(name="a", number=1))
        frozen = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))
        try:
            await frozen.execute("BEGIN")
            note = "INSERT INTO mainstay_events_inbox (group_name, event_id) VALUES ('g', 'mainstay' || chr(10) || $1)"
            await frozen.execute(note, id_)
            await frozen.prepare("SELECT 1")  # and the message to run it does not come
            database = DatabaseSettings(url=SecretStr(postgres_url), idle_transaction_seconds=1.0)
            router = EventRouter()

            @router.on_batch(Line, group="g", inbox=True, wait_seconds=0.0)
            async def handle(lines: list[Line]) -> None:
                seen.extend(line.number for line in lines)

            events = EventsModule.for_root(EventsSettings(retry_max_seconds=0.2))
            other = App(DatabaseModule.for_root(database), events, EventsModule.for_feature(router))
            async with other.running(serve=True):
                await eventually(lambda: seen == [1], what="the event of the frozen process")
        finally:
            frozen.terminate()


def test_an_unknown_kind_of_inbox_is_refused() -> None:
    """Where it is written."""
    with pytest.raises(ValueError, match=r"on\(inbox='batches'\): it is True, False or 'batch'"):
        EventRouter().on(Line, group="g", inbox="batches")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]  that is what is refused


async def test_an_id_that_is_too_long_for_an_index_is_told_from_others(postgres_url: str) -> None:
    """Others may use any text: its note was refused by PostgreSQL, again and again, and its key waited for ever."""
    events = EventRouter()
    handled: list[int] = []

    @events.on(Line, group="long", inbox=True)
    async def handle(event: Line) -> None:
        handled.append(event.number)

    ids = [os.urandom(100_000), os.urandom(100_000), b"x" * 5000 + os.urandom(3000)]
    async with service(postgres_url, events, pool=4, partitions=1).running(serve=True) as app:
        topic = app.get(EventConsumers).consumers[0]._topics[0]
        for number, id_ in [*enumerate(ids), *enumerate(ids), (9, b"short")]:
            headers = [("ce_type", b"sql.line"), ("ce_dataversion", b"1.0"), ("ce_id", id_), ("ce_source", b"x")]
            value = b'{"name": "n", "number": %d}' % number
            await app.get(SqlTransport).send([Outgoing(topic, b"k", value, headers)])
        await eventually(lambda: 9 in handled)
    assert handled == [0, 1, 2, 9]
