"""Publishing: with the unit of work that is open, once inside a workflow, and through the outbox in order."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from mainstay.core import App, Drain, Effect, bind, bind_journal, derived_id, digest
from mainstay.core.testing import VirtualClock, eventually
from mainstay.database import CommitUnknown, Database, DatabaseModule, DatabaseSettings, WrongEventLoop
from mainstay.events import (
    DeadLetters,
    Event,
    EventPublisher,
    EventRouter,
    EventsModule,
    EventsSettings,
    Metadata,
    PublishError,
)
from mainstay.events._inbox import Inbox
from mainstay.events._outbox import LANES, lane_of
from mainstay.events.metadata import ID, Outgoing
from mainstay.events.tables import DELETE_OLD_INBOX, INBOX, LOG, OUTBOX, unpack_headers
from mainstay.events.testing import Placed, in_memory


class Note(Event, type="note.made", key="name"):
    name: str
    number: int = 0


def service(url: str, *routers: EventRouter, **settings: Any) -> App:
    """An App on a database; the sql transport unless told otherwise."""
    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(url)))
    return App(database, EventsModule.for_root(EventsSettings(**settings)), EventsModule.for_feature(*routers))


async def logged(app: App) -> list[bytes]:
    """The values in the log."""
    return [row.value for row in await app.get(Database).read(sa.select(LOG).order_by(LOG.c.position))]


async def has_notes(app: App, count: int) -> bool:
    """Whether the inbox has so many notes: a list that a handler fills does not tell that its commit is done."""
    return len(await app.get(Database).read(sa.select(INBOX))) == count


async def test_an_event_commits_or_rolls_back_with_the_unit_of_work(database_url: str) -> None:
    """Nobody has to pass a session: publishing inside a transaction is part of it."""
    async with service(database_url) as app:
        database, publisher = app.get(Database), app.get(EventPublisher)
        with pytest.raises(ZeroDivisionError):
            async with database.transaction():
                await publisher.publish(Note(name="a", number=1))
                raise ZeroDivisionError
        assert await logged(app) == []
        async with database.transaction():
            await publisher.publish(Note(name="a", number=2))
        await publisher.publish(Note(name="a", number=3))
        assert await logged(app) == [b'{"name":"a","number":2}', b'{"name":"a","number":3}']


async def test_memory_publishes_when_the_unit_of_work_commits(sqlite_url: str) -> None:
    """Also the transport of tests is no dual write."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Note, group="g", inbox=True)
    async def handle(event: Note) -> None:
        seen.append(event.number)

    database = DatabaseModule.for_root(DatabaseSettings(url=SecretStr(sqlite_url)))
    async with in_memory(events, modules=[database]) as rehearsal:
        with pytest.raises(ZeroDivisionError):
            async with rehearsal.app.get(Database).transaction():
                await rehearsal.publish(Note(name="a", number=1))
                raise ZeroDivisionError
        async with rehearsal.app.get(Database).transaction():
            await rehearsal.publish(Note(name="a", number=2))
            assert rehearsal.published(Note) == []
        await rehearsal.settled()
        assert seen == [2]
        assert rehearsal.published(Note) == [Note(name="a", number=2)]


async def test_an_event_outside_any_conversation_starts_one(sqlite_url: str) -> None:
    """Its correlation id is its own id, and what its handler publishes belongs to it, caused by it."""
    events = EventRouter()
    seen: list[Metadata] = []

    @events.on(Note, group="first")
    async def first(event: Note) -> None:
        await events.publish(Placed(order=event.name))

    @events.on(Note, Placed, group="all")
    async def every(event: Note | Placed, meta: Metadata) -> None:
        seen.append(meta)

    async with in_memory(events) as rehearsal:
        alone = await rehearsal.publish(Note(name="a"))
        await rehearsal.settled()
        assert [(meta.type, meta.correlation_id, meta.causation_id) for meta in seen] == [
            ("note.made", alone, None),
            ("contract.placed", alone, alone),
        ]
        assert seen[0].id == alone
        seen.clear()
        one, two = await events.publish_batch([Note(name="b"), Note(name="c")])
        with bind(correlation_id="c-1"):
            three = await events.publish(Note(name="d"))
        await rehearsal.settled()
        notes = {meta.id: meta.correlation_id for meta in seen if meta.type == "note.made"}
        assert notes == {one: one, two: two, three: "c-1"}


class Journal:
    """A durable run, as far as publishing can see it."""

    def __init__(self, *, done: bool = False) -> None:
        self.done = done
        self.asked: list[tuple[str, bool]] = []
        self.digests: list[str] = []

    async def once(
        self, name: str, effect: Effect, *, transactional: bool, arguments: Callable[[], object] | None = None
    ) -> str:
        self.asked.append((name, transactional))
        self.digests.append(digest(arguments and arguments()))
        if not self.done:
            await effect("run-1:publish:1")
        return "run-1:publish:1"


async def test_inside_a_workflow_publishing_is_a_step_with_ids_of_its_key(database_url: str) -> None:
    """A replay publishes nothing, a repetition after a crash has the same ids, and the step shares the commit."""
    async with service(database_url) as app:
        publisher = app.get(EventPublisher)
        journal = Journal()
        with bind_journal(journal):
            published = await publisher.publish_batch([Note(name="a"), Placed(order="b")])
            assert await publisher.publish_batch([Note(name="a"), Placed(order="b")]) == published
        with bind_journal(Journal(done=True)):
            assert await publisher.publish_batch([Note(name="a"), Placed(order="b")]) == published
            assert await publisher.publish(Note(name="a")) == published[0]
        rows = await app.get(Database).read(sa.select(LOG).order_by(LOG.c.position))
        ids = [(dict(unpack_headers(row.headers))[ID] or b"").decode() for row in rows]
        once = [str(derived_id(f"run-1:publish:1:{index}")) for index in range(2)]
        assert ids == once * 2
        assert published == once
        assert journal.asked == [("publish:note.made,contract.placed", True)] * 2
        assert journal.digests == [digest([Note(name="a"), Placed(order="b")])] * 2


async def test_trap_11_an_inbox_makes_a_repeated_event_one_effect(database_url: str) -> None:
    """The same id twice in the log, one call; a handler that fails leaves no note that it succeeded."""
    events = EventRouter()
    calls: list[int] = []

    @events.on(Note, group="g", inbox=True)
    async def handle(event: Note) -> None:
        calls.append(event.number)
        if calls == [1]:
            msg = "the first attempt fails"
            raise RuntimeError(msg)

    async with service(database_url, events, retry_initial_seconds=0.0).running(serve=True) as app:
        publisher = app.get(EventPublisher)
        for _ in range(2):
            with bind_journal(Journal()):
                await publisher.publish(Note(name="a", number=1))
        await publisher.publish(Note(name="a", number=2))
        await eventually(lambda: has_notes(app, 2))
        assert calls == [1, 1, 2]


async def test_a_commit_of_unknown_outcome_is_tried_again_where_the_inbox_can_tell(sqlite_url: str) -> None:
    """Whether the commit arrived or not, the next attempt makes it one effect; without the note it would be a guess."""
    events = EventRouter()
    calls = 0

    @events.on(Note, group="g", inbox=True)
    async def handle(event: Note) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            msg = "the connection was lost while committing"
            raise CommitUnknown(msg)

    async with service(sqlite_url, events, retry_initial_seconds=0.0).running(serve=True) as app:
        await events.publish(Note(name="a"))
        await eventually(lambda: calls == 2)
        assert await app.get(DeadLetters).list() == []


async def test_trap_11_what_is_old_is_swept(database_url: str) -> None:
    """The log keeps events, and the inbox its notes, for as long as the settings say and no longer."""
    events = EventRouter()
    seen: list[int] = []

    @events.on(Note, group="g", inbox=True)
    async def handle(event: Note) -> None:
        seen.append(event.number)

    async with service(database_url, events).running(serve=True) as app:
        await events.publish(Note(name="a", number=1))
        await eventually(lambda: has_notes(app, 1))
        async with app.get(Database).transaction() as session:
            for table in (LOG, INBOX):
                await session.execute(sa.update(table).values(created_at=table.c.created_at - 8 * 86_400))
        await events.publish(Note(name="a", number=2))
        await eventually(lambda: len(seen) == 2)
    async with service(database_url, events).running(serve=True) as app:
        await eventually(lambda: has_notes(app, 1))

        async def swept() -> bool:
            return await logged(app) == [b'{"name":"a","number":2}']

        await eventually(swept)


async def test_notes_are_swept_some_at_a_time(database_url: str) -> None:
    """However many there are, no statement holds the database for long."""
    async with service(database_url) as app:
        database = app.get(Database)
        rows = [{"group_name": "g", "event_id": str(number), "created_at": 1} for number in range(6_000)]
        await database.write(sa.insert(INBOX), rows)
        await database.write(sa.insert(INBOX), {"group_name": "g", "event_id": "new", "created_at": 2**33})
        await database.write(DELETE_OLD_INBOX[database.dialect], {"seconds": 86_400.0})
        assert len(await database.read(sa.select(INBOX.c.event_id))) == 1_001
        drain = Drain()
        sweeping = asyncio.create_task(Inbox(database, 1).sweep(1.0, drain))

        async def swept() -> bool:
            return len(await database.read(sa.select(INBOX.c.event_id))) == 1

        await eventually(swept)
        drain.begin()
        await sweeping


# The outbox


def test_lanes_are_stable() -> None:
    """Equal keys share a lane, whatever their topics and ids; the number of lanes is for ever."""
    assert LANES == 8
    assert lane_of(Outgoing("a", b"k", b"", [(ID, b"1")])) == lane_of(Outgoing("b", b"k", b"", [(ID, b"2")]))
    assert len({lane_of(Outgoing("a", None, b"", [(ID, str(n).encode())])) for n in range(100)}) == LANES


async def test_an_event_that_no_broker_would_take_is_refused_when_it_is_published(sqlite_url: str) -> None:
    """In the outbox it would block its lane for ever."""
    async with service(sqlite_url, transport="kafka", kafka_servers="127.0.0.1:1") as app:
        with pytest.raises(PublishError, match="at most 900000") as caught:
            await app.get(EventPublisher).publish(Note(name="x" * 1_000_000))
        assert caught.value.no_effect
        assert not caught.value.retryable
        assert await app.get(Database).read(sa.select(OUTBOX)) == []


async def test_straight_to_the_broker_is_refused_inside_a_transaction(sqlite_url: str, kafka: str, prefix: str) -> None:
    """It would be out even if the transaction rolls back."""
    settings = {"transport": "kafka", "kafka_servers": kafka, "outbox": False, "topics": {"note.made": prefix}}
    async with service(sqlite_url, **settings) as app:
        async with app.get(Database).transaction():
            with pytest.raises(PublishError, match="outbox=False") as caught:
                await app.get(EventPublisher).publish(Note(name="a"))
        assert caught.value.no_effect
        await app.get(EventPublisher).publish(Note(name="a"))


async def test_virtual_time_drives_retries_in_rehearsals() -> None:
    """A test moves the clock instead of waiting; handlers publish on; dead letters are listed."""
    events = EventRouter()
    clock = VirtualClock()
    calls: list[float] = []

    @events.on(Note, group="g")
    async def handle(event: Note) -> None:
        calls.append(clock.monotonic())
        if event.number == 2:
            msg = "no"
            raise RuntimeError(msg)
        await events.publish(Note(name=event.name, number=2))

    async with in_memory(
        events, clock=clock, retry_attempts=3, retry_initial_seconds=60.0, retry_max_seconds=60.0
    ) as rehearsal:
        await rehearsal.publish(Note(name="a", number=1))
        await eventually(lambda: len(calls) == 2)
        with pytest.raises(TimeoutError, match="still have work: g"):
            await rehearsal.settled(0.05)
        await clock.advance(60.0)
        await clock.advance(60.0)
        await rehearsal.settled()
        letters = await rehearsal.dead_letters()
        assert [letter.attempts for letter in letters] == [3]
        assert len(rehearsal.published(Note)) == 2


async def test_publishing_from_another_loop_is_refused_at_once(database_url: str) -> None:
    """A thread with an event loop of its own gets an error that names the remedy, and nothing hangs."""
    async with service(database_url) as app:
        publisher = app.get(EventPublisher)
        with pytest.raises(WrongEventLoop, match="run_coroutine_threadsafe"):
            await asyncio.to_thread(lambda: asyncio.run(publisher.publish(Note(name="a", number=1))))
        await publisher.publish(Note(name="a", number=2))
        assert await logged(app) == [b'{"name":"a","number":2}']
