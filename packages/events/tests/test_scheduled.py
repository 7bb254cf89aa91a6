"""Events that are published for later: handed on once, when their time has come, in the order of their times."""

import asyncio
import json
import time
from collections.abc import Awaitable, Sequence
from contextvars import Context
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY
from pydantic import SecretStr
from sqlalchemy.dialects import postgresql

from mainstay.cli import main
from mainstay.core import App, ConfigurationError, Drain, bind, bind_journal, derived_id, digest
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import Database, DatabaseModule, DatabaseSettings, FenceLost
from mainstay.database.testing import expire_lease
from mainstay.events import (
    Event,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
    Metadata,
    NotScheduledError,
    ScheduledEvents,
)
from mainstay.events._schedule import ScheduleMover, SqlSchedule
from mainstay.events._sql import SqlTransport
from mainstay.events._transport import Arrivals
from mainstay.events.metadata import Outgoing
from mainstay.events.tables import LOG, NEXT_DUE, SCHEDULED, TAKE_DUE
from mainstay.events.testing import in_memory
from packages.events.tests.test_publishing import Journal

HOUR = 3600.0
DAY = 24 * HOUR


class Reminder(Event, type="reminder.due", version="1.0", key="name"):
    name: str
    number: int = 0


def service(url: str, *routers: EventRouter, clock: VirtualClock | None = None, **settings: Any) -> App:
    """An App on a database, with the sql transport."""
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url)))
    root = EventsModule.for_root(EventsSettings(**settings))
    feature = EventsModule.for_feature(*routers)
    return App(database, root, feature) if clock is None else App(database, root, feature, clock=clock)


async def logged(app: App) -> list[tuple[str, int]]:
    """What is in the log, in order."""
    rows = await app.get(Database).read(sa.select(LOG.c.value).order_by(LOG.c.position))
    return [(found["name"], found["number"]) for found in (json.loads(row.value) for row in rows)]


async def waiting(app: App) -> list[int]:
    """The numbers of what waits, the next one first."""
    found = await app.get(ScheduledEvents).list(limit=10_000)
    return [json.loads(event.value or b"")["number"] for event in found]


async def pass_time(app: App, seconds: float) -> None:
    """Bring what waits nearer, as if so much time had passed."""
    await app.get(Database).write(sa.update(SCHEDULED).values(due_at=SCHEDULED.c.due_at - seconds))


async def apart(work: Awaitable[Any]) -> Any:
    """What it returns, outside of the unit of work around the caller."""

    async def run() -> Any:
        return await work

    return await asyncio.get_running_loop().create_task(run(), context=Context())


class Moving:
    """Hands on what is due within the block, as a process that serves does."""

    def __init__(self, app: App, *, lease_seconds: float = 2.0, send: Any = None) -> None:
        database = app.get(Database)
        self.mover = ScheduleMover(
            database, Arrivals(), send or app.get(SqlTransport).send, lease_seconds=lease_seconds, clock=app.clock
        )
        self._drain = Drain()

    async def __aenter__(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self.mover.serve(self._drain), context=Context())

    async def __aexit__(self, *_: object) -> None:
        self._drain.begin()
        await self._task


# When


async def test_an_event_is_handed_on_when_its_time_has_come(database_url: str) -> None:
    """Not before, by a moment or by a delay, with what it was published with; others do not wait for it."""
    events = EventRouter()
    seen: dict[int, tuple[float, Metadata]] = {}

    @events.on(Reminder, group="g")
    async def handle(event: Reminder, meta: Metadata) -> None:
        seen[event.number] = time.time(), meta

    async with service(database_url, events).running(serve=True):
        began = time.time()
        with bind(correlation_id="c-1", actor="ann"):
            one = await events.publish(Reminder(name="a", number=1), at=datetime.now(UTC) + timedelta(seconds=0.8))
            published = time.time()
        two = await events.publish(Reminder(name="a", number=2), delay_seconds=0.4)
        three = await events.publish(Reminder(name="a", number=3))
        await eventually(lambda: len(seen) == 3)
    assert {number: meta.id for number, (_, meta) in seen.items()} == {1: one, 2: two, 3: three}
    assert seen[1][0] >= began + 0.799
    assert seen[2][0] >= began + 0.399
    meta = seen[1][1]
    assert (meta.correlation_id, meta.actor) == ("c-1", "ann")
    assert meta.time is not None
    assert began <= meta.time.timestamp() <= published  # not when it was handed on


async def test_a_moment_that_has_passed_is_now(database_url: str) -> None:
    """However long ago it was, and so is a delay of nothing."""
    async with service(database_url) as app:
        publisher = app.get(EventPublisher)
        east = timezone(timedelta(hours=14))
        await publisher.publish(Reminder(name="a", number=3), delay_seconds=0)
        await publisher.publish(Reminder(name="a", number=2), at=datetime(2001, 1, 1, tzinfo=east))
        await publisher.publish(Reminder(name="a", number=1), at=datetime(1, 1, 1, tzinfo=UTC))
        assert await logged(app) == []
        first = (await app.get(ScheduledEvents).list())[0]
        assert first.due == datetime(1, 1, 1, tzinfo=UTC)
        async with Moving(app):
            await eventually(lambda: apart(is_empty(app)))
        assert await logged(app) == [("a", 1), ("a", 2), ("a", 3)]


async def is_empty(app: App) -> bool:
    return not await app.get(Database).read(sa.select(SCHEDULED.c.position).limit(1))


async def test_what_is_far_away_is_kept_to_the_second(database_url: str) -> None:
    """The last moment and the longest delay are what they were, for those who list them."""
    async with service(database_url) as app:
        publisher, began = app.get(EventPublisher), time.time()
        late = datetime(9998, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)
        await publisher.publish(Reminder(name="a"), at=late)
        await publisher.publish(Reminder(name="b"), delay_seconds=10_000_000_000)
        delayed, last = await app.get(ScheduledEvents).list()
        assert abs(last.due - late) < timedelta(milliseconds=1)
        assert 0 <= delayed.due.timestamp() - began - 1e10 < 600
        async with Moving(app):
            await publisher.publish(Reminder(name="now"), delay_seconds=0)
            await eventually(lambda: apart(logged(app)))
        assert len(await app.get(ScheduledEvents).list()) == 2


@pytest.mark.parametrize(
    ("when", "error", "text"),
    [
        ({"at": datetime(2030, 1, 1)}, ValueError, "no time zone"),  # noqa: DTZ001  it is what is refused
        ({"at": "2030-01-01T00:00:00Z"}, TypeError, "takes a datetime with a time zone, and not str"),
        ({"at": datetime.max.replace(tzinfo=UTC)}, ValueError, "year 9998"),
        ({"at": datetime.max.replace(tzinfo=timezone(-timedelta(hours=14)))}, ValueError, "year 9998"),
        ({"at": datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))}, ValueError, "year 9998"),
        ({"delay_seconds": float("nan")}, ValueError, "and not nan"),
        ({"delay_seconds": float("inf")}, ValueError, "and not inf"),
        ({"delay_seconds": -0.001}, ValueError, "and not -0.001"),
        ({"delay_seconds": -(10**400)}, ValueError, "and not that many"),
        ({"delay_seconds": 10**5000}, ValueError, "and not that many"),
        ({"delay_seconds": True}, TypeError, "and not bool"),
        ({"delay_seconds": timedelta(seconds=3)}, TypeError, "and not timedelta"),
        ({"at": datetime(2030, 1, 1, tzinfo=UTC), "delay_seconds": 1.0}, TypeError, "not both"),
    ],
)
async def test_what_is_no_time_is_refused(when: dict[str, Any], error: type[Exception], text: str) -> None:
    """Where it is written, by its name, and nothing is published."""
    events = EventRouter()
    async with in_memory(events) as rehearsal:
        with pytest.raises(error, match=text):
            await events.publish(Reminder(name="a"), **when)
        assert rehearsal.published(Reminder) == []
        assert await rehearsal.app.get(ScheduledEvents).list() == []


async def test_on_kafka_without_an_outbox_it_is_refused_with_the_remedy() -> None:
    """There is nothing that an event could wait in; without a time it is published as ever."""
    sent: list[Outgoing] = []

    async def send(batch: Sequence[Outgoing]) -> None:
        sent.extend(batch)

    settings = EventsSettings(transport="kafka", kafka_servers="127.0.0.1:9092", outbox=False)
    publisher = EventPublisher(send, transactional=False, settings=settings, clock=VirtualClock(), schedule=None)
    with pytest.raises(ConfigurationError, match="set MAINSTAY_EVENTS_OUTBOX=true, and add DatabaseModule"):
        await publisher.publish(Reminder(name="a"), delay_seconds=1)
    assert sent == []
    await publisher.publish(Reminder(name="a"))
    assert len(sent) == 1
    assert ScheduledEvents not in EventsModule.for_root(settings).yields()


# On virtual time


async def test_virtual_time_stops_where_an_event_is_due(sqlite_url: str) -> None:
    """Fourteen days pass in no time, and each handler runs at its own moment: on `sql` and on `memory`."""
    for transport in ("sql", "memory"):
        clock, events = VirtualClock(), EventRouter()
        begun = clock.now()
        seen: list[tuple[int, float]] = []

        @events.on(Reminder, group="g")
        async def handle(
            event: Reminder, clock: VirtualClock = clock, begun: datetime = begun, seen: list[Any] = seen
        ) -> None:
            seen.append((event.number, (clock.now() - begun).total_seconds()))

        async with service(sqlite_url, events, clock=clock, transport=transport).running(serve=True):
            await events.publish(Reminder(name="a", number=3), at=begun + timedelta(days=14))
            await events.publish(Reminder(name="a", number=1), delay_seconds=60.5)
            await events.publish(Reminder(name="a", number=2), delay_seconds=60.5)
            await clock.advance(60.0)
            assert seen == []
            await clock.advance(14 * DAY - 60.0)
            await eventually(lambda seen=seen: len(seen) == 3)
        assert [number for number, _ in seen] == [1, 2, 3]
        assert all(abs(at - due) < 1.0 for (_, at), due in zip(seen, (60.5, 60.5, 14 * DAY), strict=True))


async def test_memory_keeps_what_waits_for_the_commit_and_for_a_person(sqlite_url: str) -> None:
    """A rolled back event is never handed on, and what waits is listed and cancelled as elsewhere."""
    clock, events = VirtualClock(), EventRouter()
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with in_memory(events, modules=[database], clock=clock) as rehearsal:
        scheduled, db = rehearsal.app.get(ScheduledEvents), rehearsal.app.get(Database)
        with pytest.raises(ZeroDivisionError):
            async with db.transaction():
                await events.publish(Reminder(name="a", number=1), delay_seconds=1)
                raise ZeroDivisionError
        async with db.transaction():
            await events.publish(Reminder(name="a", number=2), delay_seconds=2)
            assert await scheduled.list() == []
        gone = await events.publish(Reminder(name="b", number=3), delay_seconds=1)
        await events.publish(Reminder(name="a", number=4), at=clock.now() - timedelta(days=1))
        assert rehearsal.published(Reminder) == [Reminder(name="a", number=4)]
        assert [event.key for event in await scheduled.list()] == [b"b", b"a"]
        assert [event.id for event in await scheduled.list(key="b", type="reminder.due")] == [gone]
        assert await scheduled.list(type="another") == []
        cancelled = await scheduled.cancel(gone)
        assert (cancelled.id, cancelled.due) == (gone, clock.now() + timedelta(seconds=1))
        with pytest.raises(NotScheduledError, match=gone):
            await scheduled.cancel(gone)
        await clock.advance(3)
        assert [event.number for event in rehearsal.published(Reminder)] == [4, 2]


# Once, with the unit of work


async def test_it_commits_or_rolls_back_with_the_unit_of_work(database_url: str) -> None:
    """As any other event does, in a transaction and in a batch."""
    async with service(database_url) as app:
        database, publisher = app.get(Database), app.get(EventPublisher)
        for unit in (database.transaction, database.batch):
            with pytest.raises(ZeroDivisionError):
                async with unit():
                    await publisher.publish(Reminder(name="a", number=1), delay_seconds=HOUR)
                    raise ZeroDivisionError
        assert await waiting(app) == []
        async with database.transaction():
            await publisher.publish(Reminder(name="a", number=2), delay_seconds=HOUR)
        async with database.batch():
            await publisher.publish(Reminder(name="a", number=3), delay_seconds=HOUR)
            assert await waiting(app) == [2]
        assert await waiting(app) == [2, 3]
        assert await logged(app) == []


async def test_what_could_not_be_handed_on_waits_and_is_handed_on_once(database_url: str) -> None:
    """An error on the way takes nothing out of the table."""
    async with service(database_url) as app:
        publisher, failures = app.get(EventPublisher), 3

        async def send(batch: Sequence[Outgoing]) -> None:
            nonlocal failures
            await app.get(SqlTransport).send(batch)
            failures -= 1
            if failures >= 0:
                msg = "no space left on device"
                raise OSError(msg)

        for number in range(3):
            await publisher.publish(Reminder(name="a", number=number), delay_seconds=0)
        async with Moving(app, send=send):
            await eventually(lambda: apart(is_empty(app)))
        assert failures == -1
        assert await logged(app) == [("a", 0), ("a", 1), ("a", 2)]


async def test_what_is_due_is_handed_on_by_time_and_then_as_it_was_published(database_url: str) -> None:
    """Over more than one page, large and small; what is not due stays."""
    async with service(database_url) as app:
        database, publisher = app.get(Database), app.get(EventPublisher)
        noon = datetime(2100, 1, 1, tzinfo=UTC)
        async with database.transaction():
            for number in range(1200):
                moment = noon + timedelta(seconds=number * 7 % 5)
                name = "x" * 100_000 if number % 100 == 0 else "a"
                await publisher.publish(Reminder(name=name, number=number), at=moment)
            await publisher.publish(Reminder(name="a", number=-1), at=noon + timedelta(hours=1))
        expected = sorted(range(1200), key=lambda number: (number * 7 % 5, number))
        assert await waiting(app) == [*expected, -1]
        ((to_noon,),) = await database.read(NEXT_DUE)
        await pass_time(app, to_noon + 60)
        async with Moving(app):
            await eventually(lambda: apart(has_logged(app, 1200)))
        assert [number for _, number in await logged(app)] == expected
        assert await waiting(app) == [-1]


async def has_logged(app: App, count: int) -> bool:
    return len(await logged(app)) >= count


async def test_a_page_is_bounded_in_bytes(database_url: str) -> None:
    """However large the events are, and never less than one."""
    async with service(database_url) as app:
        database, publisher = app.get(Database), app.get(EventPublisher)
        for number in range(4):
            await publisher.publish(Reminder(name="x" * 30_000, number=number), delay_seconds=0)
        taken: list[int] = []
        for most in (100, 100_000, 100_000):
            async with database.transaction():
                taken.append(len(await database.read(TAKE_DUE[database.dialect], _page(database, most))))
        assert taken == [1, 2, 1]


UNREADABLE = ["{", "null", "[5]", '[["ce_type"]]', '[["ce_type", 5]]', '[[5, "ce_type"]]', '[["ce_type", "\u2603"]]']
"""What is in the column of headers where another release, or a person, has written it."""


async def test_what_cannot_be_read_is_passed_over_and_said(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """It holds up no other event, keeps waiting for a release that can read it, and is listed and cancelled."""
    async with service(database_url) as app:
        database, publisher, scheduled = app.get(Database), app.get(EventPublisher), app.get(ScheduledEvents)
        good = 600
        bad: list[str] = []
        async with database.transaction():
            for number in range(good):
                await publisher.publish(Reminder(name="a", number=number), delay_seconds=HOUR)
                if number % 50 == 0 and len(bad) < len(UNREADABLE):
                    bad.append(await publisher.publish(Reminder(name="b", number=number), delay_seconds=HOUR))
        before = {row.id: row.headers for row in await database.read(sa.select(SCHEDULED.c.id, SCHEDULED.c.headers))}
        for id_, headers in zip(bad, UNREADABLE, strict=True):
            await database.write(sa.update(SCHEDULED).where(SCHEDULED.c.id == UUID(id_)).values(headers=headers))
        await pass_time(app, HOUR + 1)
        async with Moving(app):
            await eventually(lambda: apart(has_logged(app, good)))
        assert await logged(app) == [("a", number) for number in range(good)]
        found = await scheduled.list()
        assert [event.id for event in found] == bad
        assert {event.type for event in found} == {"reminder.due"}
        said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert [[id_ in text for text in said].count(True) for id_ in bad] == [1] * len(bad)
        assert (await scheduled.cancel(bad[0])).id == bad[0]
        with pytest.raises(NotScheduledError):
            await scheduled.cancel(bad[0])
        for id_ in bad[1:]:  # another release can read them
            row = {"repaired": UUID(id_), "with": before[UUID(id_)]}
            repair = sa.update(SCHEDULED).where(SCHEDULED.c.id == sa.bindparam("repaired"))
            await database.write(repair.values(headers=sa.bindparam("with")), row)
        async with Moving(app):
            await eventually(lambda: apart(is_empty(app)))
        assert [name for name, _ in await logged(app)] == ["a"] * good + ["b"] * (len(bad) - 1)


async def test_a_time_that_is_none_hides_no_other_event(database_url: str) -> None:
    """Of a row that a person has changed: it is listed at the end of time, and can be cancelled."""
    async with service(database_url) as app:
        publisher, scheduled = app.get(EventPublisher), app.get(ScheduledEvents)
        never = await publisher.publish(Reminder(name="a"), delay_seconds=HOUR)
        await app.get(Database).write(sa.update(SCHEDULED).values(due_at=float("inf")))
        soon = await publisher.publish(Reminder(name="b"), delay_seconds=HOUR)
        assert [event.id for event in await scheduled.list()] == [soon, never]
        assert (await scheduled.cancel(never)).due == datetime.max.replace(tzinfo=UTC)


def _page(database: Database, most: int) -> dict[str, Any]:
    return {"limit": 500, "bytes": most, "unreadable": "[]" if database.dialect == "sqlite" else []}


async def test_two_movers_hand_on_each_event_once_and_in_order(database_url: str) -> None:
    """Processes that start and stop side by side take turns; whichever it is, the next page is behind the last."""
    async with service(database_url) as app, service(database_url) as other:
        database, publisher = app.get(Database), app.get(EventPublisher)
        async with database.transaction():
            for number in range(1600):
                await publisher.publish(Reminder(name="a", number=number), delay_seconds=0)
        for mine, theirs in ((app, other), (other, app)):
            async with Moving(mine), Moving(theirs):
                await eventually(lambda: apart(has_logged(app, 700)))
        async with Moving(app), Moving(other):
            await eventually(lambda: apart(is_empty(app)))
        assert [number for _, number in await logged(app)] == [*range(1600)]


async def test_a_mover_whose_lease_is_over_hands_on_nothing(database_url: str) -> None:
    """It has stood still, and another has taken over: its page is refused as a whole, and it lets the lease go."""
    async with service(database_url) as app, service(database_url) as other:
        await app.get(EventPublisher).publish(Reminder(name="a", number=1), delay_seconds=0)
        sleeper = Moving(app).mover
        lease = await sleeper._lead()
        assert lease is not None
        await expire_lease(app.get(Database), lease)
        successor = await Moving(other).mover._lead()
        assert successor is not None
        with pytest.raises(FenceLost):
            await sleeper._move(lease)
        assert await waiting(app) == [1]
        assert await logged(app) == []
        async with Moving(app):  # which waits
            await successor.release()
            await eventually(lambda: apart(is_empty(app)))
        assert await logged(app) == [("a", 1)]


async def test_a_takeover_waits_for_a_page_that_is_under_way(database_url: str) -> None:
    """In the middle of a page the lease ends: its successor begins behind the commit, and nothing is there twice."""
    async with service(database_url) as app, service(database_url) as other:
        taken, go_on = asyncio.Event(), asyncio.Event()

        async def send(batch: Sequence[Outgoing]) -> None:
            taken.set()
            await go_on.wait()
            await app.get(SqlTransport).send(batch)

        for number in range(3):
            await app.get(EventPublisher).publish(Reminder(name="a", number=number), delay_seconds=0)
        slow = Moving(app, send=send)
        async with slow:
            await taken.wait()
            lease = slow.mover._lease
            assert lease is not None
            if app.get(Database).dialect == "postgresql":  # SQLite has one writer, which is the mover now
                await expire_lease(app.get(Database), lease)
            async with Moving(other):
                assert await logged(app) == []
                go_on.set()
                await eventually(lambda: apart(is_empty(app)))
        assert [number for _, number in await logged(app)] == [0, 1, 2]


# For a person


async def test_what_waits_is_listed_and_cancelled(database_url: str) -> None:
    """By the id that publishing returned; what is gone is an error that dooms no unit of work around it."""
    async with service(database_url) as app:
        database, publisher, scheduled = app.get(Database), app.get(EventPublisher), app.get(ScheduledEvents)
        first = await publisher.publish(Reminder(name="a", number=1), delay_seconds=HOUR)
        second = await publisher.publish(Reminder(name="b", number=2), delay_seconds=2 * HOUR)
        (event,) = await scheduled.list(key="b")
        assert (event.id, event.type, event.topic, event.key) == (second, "reminder.due", "reminder", b"b")
        assert event.value == b'{"name":"b","number":2}'
        assert timedelta(hours=1.9) < event.due - event.published_at < timedelta(hours=2.1)
        assert [each.id for each in await scheduled.list(type="reminder.due", limit=1)] == [first]
        assert await scheduled.list(type="another") == []
        with pytest.raises(ZeroDivisionError):
            async with database.transaction():
                await scheduled.cancel(first)
                raise ZeroDivisionError
        assert await waiting(app) == [1, 2]
        async with database.transaction():
            assert (await scheduled.cancel(first)).id == first
            for gone in (first, "no id at all"):
                with pytest.raises(NotScheduledError, match=f"no event {gone} waits"):
                    await scheduled.cancel(gone)
            await publisher.publish(Reminder(name="c", number=3), delay_seconds=3 * HOUR)
        assert await waiting(app) == [2, 3]


async def test_what_is_cancelled_while_it_falls_due_is_cancelled_or_handed_on(database_url: str) -> None:
    """Never both, and never neither, in any order."""
    async with service(database_url) as app, service(database_url) as other:
        publisher, scheduled = app.get(EventPublisher), app.get(ScheduledEvents)
        cancelled: list[int] = []
        for turn in range(5):
            numbers = range(turn * 40, turn * 40 + 40)
            ids = [await publisher.publish(Reminder(name="a", number=number), delay_seconds=HOUR) for number in numbers]
            async with Moving(other):
                await pass_time(app, HOUR)
                for number, id_ in zip(reversed(numbers), reversed(ids), strict=True):
                    try:
                        await scheduled.cancel(id_)
                    except NotScheduledError:
                        continue
                    cancelled.append(number)
                await eventually(lambda: apart(is_empty(app)))
        handed_on = [number for _, number in await logged(app)]
        assert sorted([*cancelled, *handed_on]) == [*range(200)]


async def test_a_cancellation_that_is_not_committed_holds_up_no_other_event(postgres_url: str) -> None:
    """What it holds waits for it, and is handed on if it is rolled back."""
    async with service(postgres_url) as app:
        publisher = app.get(EventPublisher)
        held = await publisher.publish(Reminder(name="a", number=1), delay_seconds=0)
        for number in range(2, 5):
            await publisher.publish(Reminder(name="b", number=number), delay_seconds=0)
        with pytest.raises(ZeroDivisionError):
            async with app.get(Database).transaction():
                await app.get(ScheduledEvents).cancel(held)
                moving = Moving(app)
                await apart(moving.__aenter__())
                await eventually(lambda: apart(has_logged(app, 3)))
                raise ZeroDivisionError
        await eventually(lambda: apart(is_empty(app)))
        await moving.__aexit__()
        assert [number for _, number in await logged(app)] == [2, 3, 4, 1]


async def test_the_command_lists_and_cancels(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By type and key, and by id; a second time it is an error that names the id."""
    monkeypatch.setenv("MAINSTAY_DATABASE_URL", database_url)

    async def run(*arguments: str) -> int:
        return await asyncio.to_thread(main, ["events", "scheduled", *arguments])  # it makes a loop of its own

    async with service(database_url) as app:
        publisher = app.get(EventPublisher)
        one = await publisher.publish(Reminder(name="ann"), at=datetime(2100, 1, 2, 3, 4, 5, tzinfo=UTC))
        two = await publisher.publish(Reminder(name="bob"), at=datetime(2200, 1, 1, tzinfo=UTC))
        assert await run("list") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == [one, two]
        assert "2100-01-02 03:04:05" in lines[1]
        assert lines[1].split()[-3:] == ["reminder", "reminder.due", "ann"]
        assert await run("list", "--key", "bob", "--type", "reminder.due") == 0
        assert two in (said := capsys.readouterr().out)
        assert one not in said
        assert await run("cancel", one) == 0
        assert capsys.readouterr().out == f"cancelled: {one}, reminder.due with key ann\n"
        assert await run("cancel", one) == 2
        assert f"no event {one} waits" in capsys.readouterr().err
        assert await run("cancel", two) == 0
        assert await run("list") == 0
        assert "no scheduled events" in capsys.readouterr().out
    monkeypatch.setenv("MAINSTAY_EVENTS_TRANSPORT", "kafka")
    monkeypatch.setenv("MAINSTAY_EVENTS_KAFKA_SERVERS", "127.0.0.1:9092")
    monkeypatch.setenv("MAINSTAY_EVENTS_OUTBOX", "false")
    assert await run("list") == 2
    assert "MAINSTAY_EVENTS_OUTBOX" in capsys.readouterr().err


async def test_how_many_wait_and_what_is_overdue_is_seen(sqlite_url: str) -> None:
    """Health is degraded once an event should have been handed on long ago, and no longer when it has been."""
    async with service(sqlite_url) as app:
        schedule = SqlSchedule(app.get(Database), None, 60.0)
        scheduled = ScheduledEvents(schedule)
        drain = Drain(VirtualClock())
        measuring = asyncio.create_task(schedule.measure(drain))

        async def measured(waiting: int) -> bool:
            await schedule._measure()
            return REGISTRY.get_sample_value("mainstay_events_scheduled") == waiting

        for number in range(2):
            await app.get(EventPublisher).publish(Reminder(name="a", number=number), delay_seconds=HOUR)
        assert await measured(2)
        assert REGISTRY.get_sample_value("mainstay_events_scheduled_overdue_seconds") == 0
        assert (await scheduled.health()).status == "ok"
        await pass_time(app, HOUR + 30)
        assert await measured(2)
        assert (await scheduled.health()).status == "ok"
        await pass_time(app, 60)
        assert await measured(2)
        assert 89 < (REGISTRY.get_sample_value("mainstay_events_scheduled_overdue_seconds") or 0) < 700
        health = await scheduled.health()
        assert health.status == "degraded"
        assert "was to be handed on" in (health.detail or "")
        async with Moving(app):
            await eventually(lambda: apart(is_empty(app)))
        assert await measured(0)
        assert (await scheduled.health()).status == "ok"
        drain.begin()
        await measuring


async def test_what_is_far_away_is_not_read(postgres_url: str) -> None:
    """A look and a page cost what is due, however much waits."""
    async with service(postgres_url) as app:
        database = app.get(Database)
        many = (
            "INSERT INTO mainstay_events_scheduled (id, due_at, topic, type, headers) SELECT gen_random_uuid(), "
            "extract(epoch FROM now()) + CASE WHEN n > 10 THEN 86400 + n ELSE -n END, 't', 'x', '[]' "
            "FROM generate_series(1, 20000) n"
        )
        for prepared in (many, "ANALYZE mainstay_events_scheduled"):
            async with database.transaction() as session:
                await session.execute(sa.text(prepared))
        for statement, most in ((NEXT_DUE, 1), (TAKE_DUE["postgresql"], 11)):
            compiled: Any = statement.compile(dialect=postgresql.dialect())  # type: ignore[attr-defined]
            text = compiled.string % {**compiled.params, "limit": 500, "bytes": 10**6, "unreadable": "'{}'"}
            async with database.transaction() as session:
                explain = sa.text(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {text}")
                ((found,),) = (await session.execute(explain)).all()
            scans = [node for node in _nodes(found[0]["Plan"]) if node.get("Relation Name") == SCHEDULED.name]
            read = [node for node in scans if "Scan" in node["Node Type"]]
            assert read
            assert all(node["Actual Rows"] * node["Actual Loops"] <= most for node in read), found
            assert all("Seq" not in node["Node Type"] for node in read), found
            assert all(not node.get("Rows Removed by Filter") for node in read), found


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(each for below in plan.get("Plans", ()) for each in _nodes(below))]


# In a workflow


async def test_inside_a_workflow_it_is_one_step_whose_time_is_an_argument(database_url: str) -> None:
    """A replay schedules nothing, and its moment counts in any zone; a delay is another argument."""
    async with service(database_url) as app:
        publisher, journal = app.get(EventPublisher), Journal()
        noon = datetime(2100, 1, 1, 12, tzinfo=UTC)
        times: list[dict[str, Any]] = [
            {"at": noon},
            {"at": noon.astimezone(timezone(timedelta(hours=5)))},
            {"at": noon + timedelta(seconds=1)},
            {"delay_seconds": 60},
            {"delay_seconds": 60.0},
            {},
        ]
        with bind_journal(journal):
            ids = {await publisher.publish(Reminder(name="a"), **when) for when in times}
        assert ids == {str(derived_id("run-1:publish:1:0"))}
        assert journal.asked == [("publish:reminder.due", True)] * 6
        one, same, other, delay, same_delay, now = journal.digests
        assert one == same
        assert delay == same_delay
        assert len({one, other, delay, now}) == 4
        assert now == digest([Reminder(name="a")])
        before = await waiting(app)
        with bind_journal(Journal(done=True)):
            assert await publisher.publish(Reminder(name="a"), at=noon) in ids
        assert await waiting(app) == before
