"""The log in the database: nothing is missed, whatever order transactions commit in; partitions are shared."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from mainstay.core import App
from mainstay.core.testing import eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings
from mainstay.database.testing import expire_lease
from mainstay.events import (
    DeadLetters,
    Event,
    EventConsumers,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
)
from mainstay.events._delivery import Assignment
from mainstay.events._snapshot import START, Place, Snapshot
from mainstay.events._sql import SqlSource, SqlTransport
from mainstay.events.metadata import Record, encode, envelope
from mainstay.events.tables import INSERT_LOG, LOG, OFFSETS, pack_headers, unpack_headers


class Line(Event, type="sql.line", key="name"):
    name: str
    number: int


def service(url: str, *routers: EventRouter, **settings: Any) -> App:
    """An App on the sql transport."""
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url)))
    return App(database, EventsModule.for_root(EventsSettings(**settings)), EventsModule.for_feature(*routers))


def collecting(seen: list[int], *, group: str = "g", seconds: float = 0.0) -> EventRouter:
    """A feature that notes what it gets."""
    events = EventRouter()

    @events.on(Line, group=group)
    async def handle(event: Line) -> None:
        await asyncio.sleep(seconds)
        seen.append(event.number)

    return events


@asynccontextmanager
async def transactions(url: str) -> AsyncIterator[AsyncEngine]:
    """Transactions of others, which the test begins and commits when it likes."""
    engine = create_async_engine(url)
    try:
        yield engine
    finally:
        await engine.dispose()


async def insert(connection: AsyncConnection, number: int, name: str = "same") -> None:
    """Publish in a transaction of one's own."""
    from datetime import UTC, datetime

    from mainstay.core import Context, uuid7

    shared = envelope(time=datetime.now(UTC), source="t", context=Context())
    out = encode(Line(name=name, number=number), id=str(uuid7()), topic="sql", shared=shared)
    row = {"topic": "sql", "partition": 0, "key": out.key, "value": out.value, "headers": pack_headers(out.headers)}
    await connection.execute(INSERT_LOG, row)


async def test_trap_09_an_event_that_commits_late_is_not_missed(postgres_url: str) -> None:
    """Positions are drawn at insert and seen at commit: reading past the higher one must not lose the lower."""
    seen: list[int] = []
    async with (
        service(postgres_url, collecting(seen), partitions=1).running(serve=True),
        transactions(postgres_url) as engine,
        engine.connect() as early,
        engine.connect() as late,
    ):
        await insert(early, 1)
        await insert(late, 2)
        await late.commit()
        async with engine.begin() as third:
            await insert(third, 3)
        await eventually(lambda: seen == [2, 3], what="what is committed: an open transaction holds up only itself")
        await asyncio.sleep(0.6)  # several polls and a commit of the place, all of them past the position of 1
        await early.commit()
        await eventually(lambda: len(seen) == 3)
        assert seen == [2, 3, 1]


async def test_what_was_committed_before_another_was_published_comes_first(postgres_url: str) -> None:
    """A transaction with the lower number publishes after the other one has committed: order is by publishing."""
    seen: list[int] = []
    async with (
        service(postgres_url, collecting(seen), partitions=1).running(serve=True),
        transactions(postgres_url) as engine,
        engine.connect() as older,
    ):
        await older.execute(sa.text("SELECT pg_current_xact_id()"))  # it has its number now, the lower one
        async with engine.begin() as younger:
            await insert(younger, 1)
        await insert(older, 2)
        await older.commit()
        await eventually(lambda: len(seen) == 2)
        assert seen == [1, 2]


async def test_the_order_of_committing_and_publishing_holds_with_a_third_transaction_between(postgres_url: str) -> None:
    """A transaction that runs on between the numbers of the other two must not tear them apart."""
    seen: list[int] = []
    async with (
        transactions(postgres_url) as engine,
        engine.connect() as older,
        engine.connect() as between,
    ):
        for connection in (older, between):
            await connection.execute(sa.text("SELECT pg_current_xact_id()"))
        async with engine.begin() as younger:
            await insert(younger, 1)
        await insert(older, 2)
        await older.commit()
        async with service(postgres_url, collecting(seen), partitions=1).running(serve=True):
            await eventually(lambda: len(seen) == 2)
            await insert(between, 3)
            await between.commit()
            await eventually(lambda: len(seen) == 3)
        assert seen == [1, 2, 3]


@pytest.mark.parametrize("text", ["0:1:", "7:9:7,8", "100:100:"])
def test_a_snapshot_is_written_as_it_was_read(text: str) -> None:
    """The form is PostgreSQL's own, and says which transactions had ended."""
    snapshot = Snapshot.parse(text)
    assert Snapshot.parse(str(snapshot)) == snapshot
    assert not snapshot.shows(snapshot.end)
    assert not any(map(snapshot.shows, snapshot.running))
    assert snapshot.shows(-1)


async def test_trap_09_many_overlapping_transactions_lose_and_double_nothing(postgres_url: str) -> None:
    """Sixteen writers hold their transactions open at random; every event arrives once, each writer's in order."""
    seen: list[int] = []
    writers, each = 16, 12
    async with (
        service(postgres_url, collecting(seen), partitions=2).running(serve=True),
        transactions(postgres_url) as engine,
    ):

        async def write(writer: int) -> None:
            for number in range(each):
                async with engine.begin() as connection:
                    await insert(connection, writer * 1000 + number, name=f"w{writer}")
                    await asyncio.sleep(0.001 * ((writer * 7 + number * 3) % 11))

        await asyncio.gather(*map(write, range(writers)))
        await eventually(lambda: len(seen) >= writers * each)
    assert sorted(seen) == sorted(writer * 1000 + number for writer in range(writers) for number in range(each))
    for writer in range(writers):
        assert [n for n in seen if n // 1000 == writer] == [writer * 1000 + number for number in range(each)]


class Reading:
    """The side of a consumer, by hand."""

    def __init__(self) -> None:
        self.held: list[Assignment] = []

    def assigned(self, topic: str, partition: int) -> Assignment:
        self.held.append(Assignment(topic, partition))
        return self.held[-1]

    async def revoked(self, assignments: Any) -> None:
        self.held = [held for held in self.held if held not in assignments]

    async def lost(self, assignments: Any) -> None:
        await self.revoked(assignments)


async def pages(source: SqlSource, reading: Reading) -> list[tuple[int, Record]]:
    """Everything that there is now, in order."""
    found: list[tuple[int, Record]] = []
    empty = 0
    while empty < 2:
        fetched = await source.fetch(reading.held)
        empty = 0 if fetched else empty + 1
        for records in fetched.values():
            found += [(Line.model_validate_json(record.value or b"").number, record) for record in records]
    return found


async def test_a_place_survives_wherever_a_group_stops(database_url: str) -> None:
    """Whatever was committed last, a new reader goes on with exactly the rest; also after a page in a window."""
    async with service(database_url, partitions=1) as app:
        transport, publisher, reading = app.get(SqlTransport), app.get(EventPublisher), Reading()
        await publisher.publish_batch([Line(name="a", number=number) for number in range(1200)])
        async with transport.source("g", ["sql"], reading) as source:
            found = await pages(source, reading)
            assert [number for number, _ in found] == list(range(1200))
            await source.commit({reading.held[0]: found[700][1]})
        await publisher.publish_batch([Line(name="a", number=number) for number in range(1200, 1300)])
        reading = Reading()
        async with transport.source("g", ["sql"], reading) as source:
            found = await pages(source, reading)
            assert [number for number, _ in found] == list(range(701, 1300))
            assert source.lag() == 0
            await source.commit({reading.held[0]: found[-1][1]})
        reading = Reading()
        async with transport.source("g", ["sql"], reading) as source:
            assert await pages(source, reading) == []
            await publisher.publish(Line(name="a", number=1300))
            assert [number for number, _ in await pages(source, reading)] == [1300]


@pytest.mark.parametrize("headers", ["{", "null", "[5]", '[["ce_type", 5]]', '[[5, "ce_type"]]'])
async def test_a_row_that_cannot_be_read_is_a_dead_letter_and_holds_up_no_other(
    database_url: str, headers: str
) -> None:
    """By its column of headers, in each form that is none; the letter says so."""
    seen: list[int] = []
    async with service(database_url, partitions=1) as app:
        await app.get(EventPublisher).publish_batch([Line(name="a", number=number) for number in range(3)])
        second = sa.select(LOG.c.position).order_by(LOG.c.position).offset(1).limit(1).scalar_subquery()
        await app.get(Database).write(sa.update(LOG).where(LOG.c.position == second).values(headers=headers))
    async with service(database_url, collecting(seen), partitions=1).running(serve=True) as app:
        await eventually(lambda: seen == [0, 2])
        (letter,) = await app.get(DeadLetters).list()
        assert "the headers in the table cannot be read" in letter.error
        assert letter.key == b"a"


async def test_the_place_of_an_idle_group_is_remembered(database_url: str) -> None:
    """What was not for the group is not looked at again after a restart."""
    async with service(database_url, partitions=1) as app:
        transport, reading = app.get(SqlTransport), Reading()
        await app.get(EventPublisher).publish(Line(name="a", number=1))
        async with transport.source("g", ["other"], reading) as source:
            assert await pages(source, reading) == []
            source._remember_at = source._rebalance_at = 0.0
            await source.fetch(reading.held)
            rows = await app.get(Database).read(sa.select(OFFSETS).where(OFFSETS.c.group_name == "g"))
            assert [(row.topic, Snapshot.parse(row.low).end > 1, row.low == row.high) for row in rows] == [
                ("other", True, True)
            ]


async def test_trap_12_a_commit_after_the_lease_was_lost_changes_nothing(database_url: str) -> None:
    """Whoever slept through the end of a lease cannot move the group back, and learns that the partition is gone."""
    async with service(database_url, partitions=1) as app:
        transport, reading = app.get(SqlTransport), Reading()
        await app.get(EventPublisher).publish_batch([Line(name="a", number=number) for number in range(5)])
        async with transport.source("g", ["sql"], reading) as source:
            found = await pages(source, reading)
            lease = next(iter(source._leases.values()))
            await expire_lease(app.get(Database), lease)
            taken = await app.get(Database).lease(lease.name)
            assert taken is not None
            await source.commit({reading.held[0]: found[4][1]})
            assert reading.held == []
            (row,) = await app.get(Database).read(sa.select(OFFSETS).where(OFFSETS.c.group_name == "g"))
            assert Place.of(row) == START
            await taken.release()


async def test_partitions_are_shared_by_rank_and_given_back(database_url: str) -> None:
    """Two services split them; when one leaves, the other has them all within moments."""
    seen: list[int] = []
    settings = {"partitions": 6, "lease_seconds": 2.0}
    first = service(database_url, collecting(seen), **settings)
    second = service(database_url, collecting(seen), **settings)

    def held(app: App) -> int:
        return len(app.get(EventConsumers).consumers[0]._assignments)

    async with first.running(serve=True):
        await eventually(lambda: held(first) == 6, what="all partitions")
        async with second.running(serve=True):
            await eventually(lambda: (held(first), held(second)) == (3, 3), what="half each")
            assert "3 partitions" in (await second.get(EventConsumers).consumers[0].health()).detail
        await eventually(lambda: held(first) == 6, what="all partitions again")


async def test_more_partitions_once_are_read_to_the_end(database_url: str) -> None:
    """After the setting was lowered, what waits in the higher partitions is still handled."""
    seen: list[int] = []
    async with service(database_url, collecting(seen), partitions=8).running(serve=True) as app:
        publisher = app.get(EventPublisher)
        await publisher.publish_batch([Line(name=f"k{number}", number=number) for number in range(50)])
        await eventually(lambda: len(seen) == 50)
    async with service(database_url, partitions=8) as app:
        publisher = app.get(EventPublisher)
        await publisher.publish_batch([Line(name=f"k{number}", number=number) for number in range(50, 100)])
    async with service(database_url, collecting(seen), partitions=2).running(serve=True):
        await eventually(lambda: len(seen) == 100)
    assert sorted(seen) == list(range(100))


async def test_trap_02_a_full_window_of_unfinished_events_holds_the_reading_back() -> None:
    """Back-pressure: while handlers hang, a thousand events of a partition are in memory and no more."""
    events = EventRouter()
    gate = asyncio.Event()
    seen: list[int] = []

    @events.on(Line, group="g")
    async def handle(event: Line) -> None:
        await gate.wait()
        seen.append(event.number)

    async with service("sqlite+aiosqlite:///:memory:", events, partitions=1).running(serve=True) as app:
        await events.publish_batch([Line(name="a", number=number) for number in range(2500)])
        consumer = app.get(EventConsumers).consumers[0]

        def window() -> int:
            return sum(len(assignment.window) for assignment in consumer._assignments)

        await eventually(lambda: window() >= 1000)
        await asyncio.sleep(0.3)  # a reader without bounds would have the rest by now
        assert 1000 <= window() <= 1500
        gate.set()
        await eventually(lambda: len(seen) == 2500)
    assert seen == list(range(2500))


def test_headers_come_back_byte_for_byte() -> None:
    """Whatever a foreign producer wrote."""
    headers = [("a", bytes(range(256))), ("ü", b""), ("a", b"twice"), ("null", None)]
    assert unpack_headers(pack_headers(headers)) == headers


async def test_the_transport_names_its_place(sqlite_url: str) -> None:
    """Health says where events are."""
    async with service(sqlite_url) as app:
        assert (await app.health())["events.SqlTransport"].detail == "events are kept in the Database"
        assert (await app.get(EventConsumers).health()).detail == "no groups"


async def test_fewer_partitions_than_before_leave_nothing_unread(database_url: str) -> None:
    """Also where nobody had read anything of the higher partitions before the setting was lowered."""
    seen: list[int] = []
    async with service(database_url, partitions=8) as app:
        await app.get(EventPublisher).publish_batch([Line(name=f"k{number}", number=number) for number in range(50)])
    async with service(database_url, collecting(seen), partitions=2).running(serve=True) as app:
        await app.get(EventPublisher).publish(Line(name="k0", number=50))
        await eventually(lambda: len(seen) == 51)
    assert sorted(seen) == list(range(51))


class Word(Event, type="word.written", version="1.0", key="name"):
    name: str
    number: int


async def test_a_partition_that_stays_empty_keeps_the_pages_of_no_other_small() -> None:
    """It is read together with them, and of its records no size is known."""
    seen: list[int] = []
    lines = collecting(seen)
    async with service("sqlite+aiosqlite:///:memory:", lines, partitions=4).running(serve=True) as app:
        await lines.publish_batch([Line(name="a", number=number) for number in range(100)])
        await eventually(lambda: len(seen) == 100)
        held = app.get(EventConsumers).consumers[0]._assignments
        assert len(held) == 4
        assert {each.most for each in held} == {500}


async def test_members_of_a_group_may_read_different_topics(database_url: str) -> None:
    """Two releases of a service do, for a while: the partitions of a topic are divided among those that read it."""
    lines, words, both = list[int](), list[int](), list[int]()
    topics = {"line.written": "lines", "word.written": "words"}
    routers = EventRouter(), EventRouter(), EventRouter()

    @routers[0].on(Line, group="shared")
    async def line(event: Line) -> None:
        lines.append(event.number)

    @routers[1].on(Word, group="shared")
    async def word(event: Word) -> None:
        words.append(event.number)

    @routers[2].on(Line, Word, group="shared")
    async def either(event: Line | Word) -> None:
        both.append(event.number)

    old, other, new = (service(database_url, router, topics=topics, partitions=4) for router in routers)
    async with old.running(serve=True), other.running(serve=True):
        await old.get(EventPublisher).publish_batch([Line(name=f"{n}", number=n) for n in range(40)])
        await other.get(EventPublisher).publish_batch([Word(name=f"{n}", number=n) for n in range(40)])
        await eventually(lambda: len(lines) == len(words) == 40, what="each topic by its reader")
        async with new.running(serve=True):
            consumers = [app.get(EventConsumers).consumers[0] for app in (old, other, new)]
            await eventually(lambda: [len(each._assignments) for each in consumers] == [2, 2, 4], what="halves")
            await new.get(EventPublisher).publish_batch([Line(name=f"{n}", number=n) for n in range(40, 80)])
            await new.get(EventPublisher).publish_batch([Word(name=f"{n}", number=n) for n in range(40, 80)])
            await eventually(lambda: len(lines) + len(words) + len(both) == 160, what="everything")
    assert sorted(lines + words + both) == sorted([*range(80), *range(80)])
    assert both


async def test_the_lag_is_true_in_events_and_seconds(database_url: str) -> None:
    """It counts what was not read and what is not finished; a mere backlog is said by health, and is no fault."""
    events = EventRouter()
    gate = asyncio.Event()

    @events.on(Line, group="g")
    async def handle(_event: Line) -> None:
        await gate.wait()

    async with service(database_url, partitions=2) as app:
        publisher = app.get(EventPublisher)
        await publisher.publish_batch([Line(name=f"{number % 50}", number=number) for number in range(3_000)])
        async with app.get(Database).transaction() as session:
            await session.execute(sa.update(LOG).values(created_at=LOG.c.created_at - 100))
    async with service(database_url, events, partitions=2).running(serve=True) as app:
        consumers = app.get(EventConsumers)
        consumer = consumers.consumers[0]
        await eventually(lambda: consumer.lag()[0] == 3_000, what="all of them, read or not")
        assert 99 <= (consumer.lag()[1] or 0.0) < 1_000  # by two clocks, compared over a query
        assert sum(len(assignment.window) for assignment in consumer._assignments) < 3_000
        health = await consumers.health()
        assert health.status == "ok"
        assert re.search(r"group g: 2 partitions, 3000 events wait, the oldest for (99|1\d\d) s", health.detail or "")
        gate.set()
        await eventually(lambda: consumer.lag() == (0, 0.0))
        assert (await consumers.health()).detail == "group g: 2 partitions"


async def test_an_event_of_another_process_is_handled_at_its_hint(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NOTIFY wakes the reader, which without it would look again much later; polling alone finds it too."""
    seen: list[int] = []
    monkeypatch.setattr("mainstay.events._sql._POLL_SECONDS", 3_600.0)
    async with (
        service(postgres_url) as publishing,
        service(postgres_url, collecting(seen), partitions=1).running(serve=True) as handling,
    ):
        database = handling.get(Database)
        await eventually(lambda: database.hears_others)
        for number in range(20):
            await publishing.get(EventPublisher).publish(Line(name="a", number=number))
            await eventually(lambda number=number: len(seen) == number + 1, what=f"event {number}")
        monkeypatch.undo()  # or the stop would wait for the end of the last look
        await publishing.get(EventPublisher).publish(Line(name="a", number=20))
        await eventually(lambda: seen == list(range(21)))
